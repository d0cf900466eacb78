"""The algorithms: tensors in, tensors out; no model, no file."""

from qkern.quantizers.awq import (
    grouped_query_share,
    producer_scales,
    search_clip,
    search_gguf_scales,
    search_scales,
)
from qkern.quantizers.gptq import GPTQConfig, LayerResult, output_error, quantize_gptq
from qkern.quantizers.gptq_gguf import GGUFResult, gguf_output_error, quantize_gptq_gguf
from qkern.quantizers.hessian import HessianAccumulator
from qkern.quantizers.observers import OBSERVERS, ActivationRange, ActivationSample
from qkern.quantizers.requantize import requantize
from qkern.quantizers.rtn import default_search, quantize_rtn
from qkern.quantizers.smoothquant import Smoothing, search_smoothing, smoothing_scales

__all__ = [
    "OBSERVERS",
    "ActivationRange",
    "ActivationSample",
    "GGUFResult",
    "GPTQConfig",
    "HessianAccumulator",
    "LayerResult",
    "Smoothing",
    "default_search",
    "gguf_output_error",
    "grouped_query_share",
    "output_error",
    "producer_scales",
    "quantize_gptq",
    "quantize_gptq_gguf",
    "quantize_rtn",
    "requantize",
    "search_clip",
    "search_gguf_scales",
    "search_scales",
    "search_smoothing",
    "smoothing_scales",
]
