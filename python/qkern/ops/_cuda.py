"""The door to the native CUDA module: loads it, and says why it cannot serve a device.

`emulated` puts in its place the same kernels compiled for the CPU, so that tests run them without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.errors import NativeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "build",
    "capability",
    "emulated",
    "is_current",
    "module",
    "on_device",
    "pointer",
    "processors",
    "stream",
    "why_not_cuda",
]

_emulated: Any = None
_NOTHING: Final = contextlib.nullcontext()


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        from qkern import _cuda  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return None, f"this build of qkern has no CUDA kernels ({build() or error})"
    return _cuda, None


def build() -> str | None:
    """How the CUDA kernels were built, or why they were left out; None if the CPU module does not load."""
    try:
        from qkern import _core
    except ImportError:
        return None
    text: str = _core.CUDA_BUILD
    return text


def module() -> Any:
    """Return the native module.

    Raises
    ------
    NativeError
        If it does not load.
    """
    if _emulated is not None:
        return _emulated
    loaded, reason = _load()
    if loaded is None:
        raise NativeError(str(reason))
    return loaded


# Devices that a kernel has run on; one that failed is asked again, as the reason may pass.
_proven: Final[set[int]] = set()


def _why_not(index: int) -> str | None:
    if index in _proven:
        return None
    loaded, reason = _load()
    if loaded is None:
        return reason
    with torch.cuda.device(index):
        error: str = loaded.probe()
    if not error:
        _proven.add(index)
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"CUDA reports {error} on cuda:{index}, an sm_{major}{minor}; this build has kernels for "
        f"{loaded.ARCHITECTURES}: update the driver, or install qkern with "
        f"-C cmake.define.QKERN_CUDA_ARCHITECTURES={major}{minor}"
    )


def why_not_cuda(device: torch.device) -> str | None:
    """Why the native CUDA kernels cannot serve tensors on `device`; None if they can."""
    if _emulated is not None:
        return None if device.type == "cpu" else f"the tensors are on {device}, the emulator is on the CPU"
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if torch.version.hip is not None:
        return "this torch runs on ROCm"
    return _why_not(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        compiled = divmod(module().compiled_for(), 10)
    return min((properties.major, properties.minor), compiled), properties.multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """Capability that the kernels for `device` were compiled for: not what its driver made of older PTX."""
    return (9, 0) if _emulated is not None else _properties(device.index)[0]


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; of an emulated one few, so that small tests use all of them."""
    return 4 if _emulated is not None else _properties(device.index)[1]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """Address of the current stream of `device`."""
    if _emulated is not None:
        return 0
    raw: int = torch._C._cuda_getCurrentRawStream(device.index)
    return raw


def is_current(device: torch.device) -> bool:
    """Whether `device`, on which there is a tensor, is the current one, as a launch demands."""
    return _emulated is not None or torch._C._cuda_getDevice() == device.index


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one; costs next to nothing where it is already."""
    return _NOTHING if is_current(device) else torch.cuda.device(device)


@contextlib.contextmanager
def emulated(replacement: Any) -> Iterator[None]:
    """Run the CUDA backend on the CPU, on a module whose kernels were compiled for it."""
    global _emulated
    before, _emulated = _emulated, replacement
    try:
        yield
    finally:
        _emulated = before
