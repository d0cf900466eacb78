"""Importing this runs transformers' AWQ, GPTQ and compressed-tensors models on qkern's kernels.

So it does with bitsandbytes' models whose experts are in 4 or 8 bits, which transformers does not load.
``from_pretrained`` and ``pipeline`` need nothing else; `disable` gives transformers its own classes back.
"""

from qkern.integrations.hf_methods import QkernConfig, disable, enable

__all__ = ["QkernConfig", "disable", "enable"]

enable()
