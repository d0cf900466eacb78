"""The exceptions that qkern raises on purpose, and how the reason of a foreign one is put in words.

Every message names four things: what is wrong, what arrived, what is allowed, what to do.
"""

from __future__ import annotations

import errno

__all__ = [
    "FormatError",
    "InputError",
    "NativeError",
    "OutputError",
    "QkernError",
    "UnsupportedError",
    "advice_on_writing",
    "reason_of",
]


class QkernError(Exception):
    """Base of every error that qkern raises on purpose; the command line prints it and exits 1."""


class InputError(QkernError, ValueError):
    """An argument, tensor or text that the called function cannot accept."""


class FormatError(QkernError, ValueError):
    """A file that is truncated, hostile, inconsistent or of a format that is not read."""


class OutputError(QkernError):
    """An output that the system did not let be written; nothing half-written is left."""


class UnsupportedError(QkernError, NotImplementedError):
    """A valid request that the chosen backend, format or runtime cannot carry out.

    The message says why not, and what can be done instead.
    """


class NativeError(QkernError, RuntimeError):
    """The native module is missing, does not load, or reported an internal failure."""


def reason_of(error: Exception) -> str:
    """Say in one line what a foreign error says; of the system's without number and file name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines())


def advice_on_writing(error: Exception) -> str:
    """Say what to do about a file that could not be written."""
    number = getattr(error, "errno", None)
    # safetensors and numpy report a full disk without its number.
    full = number in (errno.ENOSPC, errno.EDQUOT) or (
        number is None and any(words in str(error) for words in ("No space left", "requested and"))
    )
    return "the disk is full: free space" if full else "choose another output"
