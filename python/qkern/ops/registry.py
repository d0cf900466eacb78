"""Which backend can run which op for which scheme, dtype and device; the one place that knows.

A backend module registers an `Implementation`; the public function of an op asks `select`. The matrix
that ``qkern info`` and the README print is read from here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from qkern.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from qkern.schemes import Scheme

__all__ = ["Backend", "Implementation", "Request", "explain", "folder", "matrix", "register", "select"]

logger = logging.getLogger(__name__)


class Backend(StrEnum):
    """Where an op can run."""

    REFERENCE = "reference"
    """Plain torch, any device; the oracle of every test, and all that runs on MPS."""
    CPU = "cpu"
    """Native C++ kernels."""
    CUDA = "cuda"
    """Native CUDA kernels."""
    TRITON = "triton"
    """Triton kernels."""


# auto takes the first that can run.
PREFERENCE: Final = (Backend.CPU, Backend.CUDA, Backend.TRITON, Backend.REFERENCE)
# Type of device that a backend is made for; Triton's interpreter, on the CPU, is for tests.
_HOMES: Final = {Backend.CPU: "cpu", Backend.CUDA: "cuda", Backend.TRITON: "cuda"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a call asks of a backend; None means that the op does not depend on it.

    Parameters
    ----------
    device : torch.device
        Device of the inputs.
    scheme : Scheme or None
        Scheme of the weight.
    dtype : torch.dtype or None
        Dtype of the floating-point input.
    """

    device: torch.device
    scheme: Scheme | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One op on one backend.

    Parameters
    ----------
    op : str
        Name of the op's folder.
    backend : Backend
        Where it runs.
    call : callable
        The function; its signature is the op's own and it assumes validated arguments.
    why_not : callable
        Returns why it cannot run a `Request`, or None if it can.
    """

    op: str
    backend: Backend
    call: Callable[..., Any]
    why_not: Callable[[Request], str | None]


_IMPLEMENTATIONS: Final[dict[tuple[str, Backend], Implementation]] = {}
_FALLBACKS_LOGGED: Final[set[tuple[str, str]]] = set()


def register(implementation: Implementation) -> None:
    """Enter an implementation; a second one for the same op and backend replaces the first."""
    _IMPLEMENTATIONS[implementation.op, implementation.backend] = implementation


def folder(op: str, backend: Backend) -> str:
    """Name of the folder that holds an implementation; two ops may share one, as packing and unpacking do."""
    return _IMPLEMENTATIONS[op, backend].call.__module__.split(".")[-2]


def explain(op: str, backend: Backend, request: Request) -> str | None:
    """Why `backend` cannot run `op` for `request`; None if it can."""
    implementation = _IMPLEMENTATIONS.get((op, backend))
    if implementation is None:
        return f"{op} has no {backend} implementation in this build"
    return implementation.why_not(request)


def select(op: str, backend: str, request: Request) -> Implementation:
    """Choose the implementation of `op`.

    Parameters
    ----------
    op : str
        Name of the op.
    backend : str
        A `Backend`, which must be able to run, or ``"auto"``, which falls back and says so once.
    request : Request
        What is asked.

    Raises
    ------
    InputError
        If the backend's name is unknown.
    UnsupportedError
        If the named backend cannot run; the message says why.
    """
    if backend != "auto":
        try:
            named = Backend(backend)
        except ValueError:
            allowed = ", ".join(("auto", *Backend))
            raise InputError(f"unknown backend: got {backend!r}, allowed are {allowed}") from None
        reason = explain(op, named, request)
        if reason is not None:
            raise UnsupportedError(
                f"backend {named} cannot run {op}: {reason}; see `qkern info`, or use backend='auto'"
            )
        return _IMPLEMENTATIONS[op, named]
    for candidate in PREFERENCE:
        reason = explain(op, candidate, request)
        if reason is None:
            return _IMPLEMENTATIONS[op, candidate]
        _log_fallback(op, candidate, reason, request)
    raise UnsupportedError(f"no backend can run {op} on {request.device}; see `qkern info`")


def _log_fallback(op: str, backend: Backend, reason: str, request: Request) -> None:
    # A backend of another device is no fallback from anything.
    if backend.value != request.device.type or (op, reason) in _FALLBACKS_LOGGED:
        return
    _FALLBACKS_LOGGED.add((op, reason))
    logger.info("%s does not use its %s kernels: %s", op, backend, reason)


def matrix(device: torch.device, schemes: Iterable[Scheme], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of op, backend, scheme and the reason why it is not supported (None: supported).

    Backends of other devices have none.
    """
    schemes = tuple(schemes)
    rows = []
    for op, backend in sorted(_IMPLEMENTATIONS):
        if _HOMES.get(backend, device.type) != device.type:
            continue
        for scheme in schemes:
            reason = explain(op, backend, Request(device=device, scheme=scheme, dtype=dtype))
            rows.append({"op": op, "backend": backend.value, "scheme": str(scheme), "reason": reason})
    return rows
