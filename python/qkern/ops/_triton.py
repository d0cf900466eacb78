"""The door to Triton: says why its kernels cannot serve a device, and imports them when they are first used.

Triton is optional, and a kernel is decorated when its module is imported, so kernels live in modules of
their own (``triton_kernels.py`` of each op) that nothing imports at start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch

from qkern import _env
from qkern.errors import NativeError

__all__ = [
    "autotuned",
    "capability",
    "interpreted",
    "kernels",
    "on_device",
    "processors",
    "shared_memory",
    "stored_dtype",
    "why_not_triton",
]

# Before it compiled divisions lose subnormal numbers, which the reference keeps.
_OLDEST = (3, 6)


@functools.cache
def _why_not_installed() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'triton>=3.6'"
    version: str = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton is too old: got {version}, allowed is 3.6 or newer"
    return None


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors on `device`; None if it can. Imports it only where it may serve."""
    if _env.triton_interpreted():
        if device.type != "cpu":
            return f"the tensors are on {device}, and TRITON_INTERPRET=1 runs kernels on the CPU"
    elif device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    return _why_not_installed()


def kernels(op: str) -> Any:
    """Return the module that holds the kernels of `op`.

    Raises
    ------
    NativeError
        If Triton does not import.
    """
    reason = _why_not_installed()
    if reason is not None:
        raise NativeError(reason)
    return importlib.import_module(f"qkern.ops.{op}.triton_kernels")


def interpreted(device: torch.device) -> bool:
    """Whether kernels on tensors of `device` run in the interpreter."""
    return device.type == "cpu"


def stored_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype that a kernel stores for `dtype`: the interpreter cuts bf16 off where it should round to even."""
    return torch.float32 if interpreted(device) and dtype == torch.bfloat16 else dtype


def autotuned(device: torch.device) -> bool:
    """Whether kernels on `device` time candidates instead of taking a tile from a table."""
    return _env.triton_autotune() and not interpreted(device)


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; for the interpreter few, so that small tests use all of them."""
    return 4 if interpreted(device) else int(_properties(device.index).multi_processor_count)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    properties = _properties(device.index)
    return properties.major, properties.minor


@functools.cache
def _shared_memory(index: int) -> int:
    import triton

    # torch tells it on CUDA alone, and not before 2.7.
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; the interpreter knows no limit."""
    return 1 << 30 if interpreted(device) else _shared_memory(device.index)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one, as a launch demands; costs nothing where it is already."""
    if interpreted(device) or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
