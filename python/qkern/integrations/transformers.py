"""Importing this runs transformers' AWQ, GPTQ and compressed-tensors models on qkern's kernels.

``from_pretrained`` and ``pipeline`` need nothing else; `disable` gives transformers its own classes back.
"""

from qkern.integrations.hf_methods import QkernConfig, disable, enable

__all__ = ["QkernConfig", "disable", "enable"]

enable()
