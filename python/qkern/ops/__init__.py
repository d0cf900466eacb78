"""The ops: one folder each, the same name in csrc/kernels, tests/ops and bench."""

from qkern.ops.dequantize_groupwise import dequantize_groupwise
from qkern.ops.gptq_update import gptq_update
from qkern.ops.pack_bits import pack_bits, unpack_bits
from qkern.ops.quantize_groupwise import quantize_groupwise

__all__ = ["dequantize_groupwise", "gptq_update", "pack_bits", "quantize_groupwise", "unpack_bits"]
