"""The ops: one folder each, the same name in csrc/kernels, tests/ops and bench."""

from qkern.ops.dequant_matmul import dequant_matmul, pack_weight, unpack_weight
from qkern.ops.dequantize_groupwise import dequantize_groupwise
from qkern.ops.gguf_decode import gguf_decode
from qkern.ops.gguf_encode import gguf_encode
from qkern.ops.gptq_update import gptq_update
from qkern.ops.int8_matmul import int8_linear, int8_matmul
from qkern.ops.pack_bits import pack_bits, unpack_bits
from qkern.ops.quantize_activations import quantize_activations
from qkern.ops.quantize_groupwise import quantize_groupwise

__all__ = [
    "dequant_matmul",
    "dequantize_groupwise",
    "gguf_decode",
    "gguf_encode",
    "gptq_update",
    "int8_linear",
    "int8_matmul",
    "pack_bits",
    "pack_weight",
    "quantize_activations",
    "quantize_groupwise",
    "unpack_bits",
    "unpack_weight",
]
