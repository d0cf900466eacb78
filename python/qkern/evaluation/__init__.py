"""How good a quantized model is: perplexity, KL divergence, bits per weight."""

from qkern.evaluation.bits import bpw_file, bpw_linear, file_bytes, gguf_bpw_linear, parameter_count
from qkern.evaluation.kl import MIN_POSITIONS, Interval, kl_divergence, paired_bootstrap
from qkern.evaluation.perplexity import perplexity, token_losses
from qkern.evaluation.windows import bos_if_added, read_text, token_ids, window_logits

__all__ = [
    "MIN_POSITIONS",
    "Interval",
    "bos_if_added",
    "bpw_file",
    "bpw_linear",
    "file_bytes",
    "gguf_bpw_linear",
    "kl_divergence",
    "paired_bootstrap",
    "parameter_count",
    "perplexity",
    "read_text",
    "token_ids",
    "token_losses",
    "window_logits",
]
