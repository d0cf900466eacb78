"""The exceptions that qkern raises on purpose.

Every message names four things: what is wrong, what arrived, what is allowed, what to do.
"""

from __future__ import annotations

__all__ = ["FormatError", "InputError", "NativeError", "QkernError", "UnsupportedError"]


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
