"""The door to the native CPU module: loads it once, forces the tier, and says why when it cannot."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern import _env
from qkern.errors import InputError, NativeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "CODE_RANGE",
    "DTYPE_CODES",
    "NON_FINITE",
    "SCALE_OVERFLOW",
    "core",
    "empty",
    "force_tier",
    "pointer",
    "rows_of",
    "threads",
    "usable_tiers",
    "why_not_cpu",
]

# Loaded with this module and not at the first call: it must see a fork to know that the threads are gone.
with contextlib.suppress(ImportError):  # `_load` says why
    import qkern._core  # noqa: F401

# Order of qk::DType in csrc/include/qkern/types.h.
DTYPE_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Values of qk::Status there.
NON_FINITE: Final = 1
SCALE_OVERFLOW: Final = 2
CODE_RANGE: Final = 3
# Memory of this size comes fresh from the system (glibc's allocator keeps none so large), and a fault for
# each page of 4 KiB costs as much as writing it.
FRESH_BYTES: Final = 32 << 20


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        from qkern import _core
    except ImportError as error:
        return (
            None,
            f"the native module qkern._core does not load ({error}); reinstall qkern with a C++17 compiler",
        )
    tier = _env.cpu_tier()
    if tier is not None and not _core.set_tier(tier):
        raise InputError(
            f"QKERN_CPU_TIER={tier} cannot run here: usable tiers are {', '.join(_core.usable_tiers())} "
            f"(compiled: {', '.join(_core.compiled_tiers())}); unset it or name one of these"
        )
    return _core, None


def core() -> Any:
    """Return the native module.

    Raises
    ------
    NativeError
        If it does not load.
    InputError
        If ``QKERN_CPU_TIER`` names a tier that cannot run here.
    """
    module, reason = _load()
    if module is None:
        raise NativeError(reason)
    return module


def why_not_cpu(device: torch.device) -> str | None:
    """Why the native CPU kernels cannot serve tensors on `device`; None if they can."""
    if device.type != "cpu":
        return f"the tensors are on {device}, not on the CPU"
    return _load()[1]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill, whatever torch's default device and default dtype are."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if out.nbytes >= FRESH_BYTES and _load()[0] is not None:
        core().advise_large_pages(out.data_ptr(), out.nbytes)
    return out


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None.

    Raises
    ------
    InputError
        If the tensor is on another device than the CPU: a kernel cannot follow its address.
    """
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise InputError(
            "all tensors of a call to the native kernels must be on the CPU: "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; move it to the CPU"
        )
    return tensor.data_ptr()


def rows_of(matrix: Tensor) -> tuple[Tensor, int]:
    """Return a matrix whose columns are adjacent, and its row stride; copies only if they are not."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)


def threads() -> int:
    """Threads that a native call may use: as many as torch uses."""
    return torch.get_num_threads()


class force_tier:
    """Context manager that makes one CPU tier the active one.

    Raises
    ------
    InputError
        On entry, if the tier is not compiled or this machine cannot run it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._before = ""

    def __enter__(self) -> None:
        self._before = core().active_tier()
        if not core().set_tier(self._name):
            raise InputError(f"CPU tier {self._name!r} cannot run here: usable are {core().usable_tiers()}")

    def __exit__(self, *exc: object) -> None:
        core().set_tier(self._before)


def usable_tiers() -> Iterator[str]:
    """Tiers that were compiled and that this machine can run."""
    return iter(core().usable_tiers())
