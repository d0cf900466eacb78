"""The exceptions that qkern raises on purpose, and how the reason of a foreign one is put in words.

Every message names four things: what is wrong, what arrived, what is allowed, what to do.
"""

from __future__ import annotations

__all__ = ["FormatError", "InputError", "NativeError", "QkernError", "UnsupportedError", "reason_of"]


class QkernError(Exception):
    """Base of every error that qkern raises on purpose; the command line prints it and exits 1."""


class InputError(QkernError, ValueError):
    """An argument, tensor or text that the called function cannot accept."""


class FormatError(QkernError, ValueError):
    """A file that is truncated, hostile, inconsistent or of a format that is not read."""


class UnsupportedError(QkernError, NotImplementedError):
    """A valid request that the chosen backend, format or runtime cannot carry out.

    Parameters
    ----------
    reason : str
        Why not, and what can be done instead.
    """


class NativeError(QkernError, RuntimeError):
    """The native module is missing, does not load, or reported an internal failure."""


def reason_of(error: Exception) -> str:
    """Say in one line what a foreign error says; of the system's without number and file name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines())
