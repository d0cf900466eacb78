"""The ops: one folder each, the same name in csrc/kernels, tests/ops and bench."""

from qkern.ops.quantize_groupwise import quantize_groupwise

__all__ = ["quantize_groupwise"]
