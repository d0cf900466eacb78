"""The algorithms: tensors in, tensors out; no model, no file."""

from qkern.quantizers.awq import grouped_query_share, producer_scales, search_clip, search_scales
from qkern.quantizers.gptq import GPTQConfig, LayerResult, output_error, quantize_gptq
from qkern.quantizers.hessian import HessianAccumulator
from qkern.quantizers.rtn import quantize_rtn

__all__ = [
    "GPTQConfig",
    "HessianAccumulator",
    "LayerResult",
    "grouped_query_share",
    "output_error",
    "producer_scales",
    "quantize_gptq",
    "quantize_rtn",
    "search_clip",
    "search_scales",
]
