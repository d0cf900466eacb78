"""Which quantizers transformers asks by the method of a model: `enable` and `disable`."""

from __future__ import annotations

import functools
from typing import Any, Final

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qkern.checkpoints.bitsandbytes import BITSANDBYTES, LLM_INT8
from qkern.errors import UnsupportedError
from qkern.integrations.hf_config import STORED, BitsAndBytesConfig, QkernConfig, StoredConfig
from qkern.integrations.hf_conversion import WEIGHT, stored_names
from qkern.integrations.hf_quantizer import CheckpointQuantizer, LoadTimeQuantizer
from qkern.nn import expert_parts
from qkern.pipelines.load import model_names

__all__ = ["QkernConfig", "disable", "enable"]


def _choose(method: str, config: Any, **kwargs: Any) -> HfQuantizer:
    """Return our quantizer, or transformers' own for a checkpoint that qkern does not read."""
    if isinstance(config, StoredConfig):
        return CheckpointQuantizer(config, **kwargs)
    if kwargs.get("pre_quantized", True):
        return _theirs[method][0](config, **kwargs)
    return LoadTimeQuantizer(QkernConfig.of(config), **kwargs)


class _UnlessExperts(HfQuantizer):  # type: ignore[misc]
    """transformers' own quantizer, until a checkpoint turns out to have experts in 4 or 8 bits."""

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        if not (self.pre_quantized and _has_quantized_experts(model, kwargs.get("checkpoint_files"))):
            super().preprocess_model(model, dtype=dtype, **kwargs)
            return
        # transformers goes on with this object, and a quantizer is not told of the model before.
        ours: Any = self
        ours.__class__ = CheckpointQuantizer
        ours.__init__(BitsAndBytesConfig.from_dict(self.quantization_config.to_dict()))
        # What it was asked before, when it was another's.
        ours.validate_environment(device_map=kwargs.get("device_map"))
        ours.update_dtype(dtype)
        ours.preprocess_model(model, dtype=dtype, **kwargs)


def _has_quantized_experts(model: Any, files: list[str] | None) -> bool:
    experts = {name for parts in expert_parts(model).values() for name in parts}
    if not experts:
        return False
    markers = tuple(f".{format.marker}" for format in (BITSANDBYTES, LLM_INT8))
    layers = [name.removesuffix(end) for name in stored_names(files) for end in markers if name.endswith(end)]
    return any(f"{layer}.{WEIGHT}" in experts for layer in model_names(layers, model).values())


class _Bnb4BitQuantizer(_UnlessExperts, Bnb4BitHfQuantizer):  # type: ignore[misc]
    pass


class _Bnb8BitQuantizer(_UnlessExperts, Bnb8BitHfQuantizer):  # type: ignore[misc]
    pass


_ours: Final[dict[str, tuple[Any, Any]]] = {
    **{method: (functools.partial(_choose, method), config) for method, config in STORED.items()},
    "bitsandbytes_4bit": (_Bnb4BitQuantizer, transformers.BitsAndBytesConfig),
    "bitsandbytes_8bit": (_Bnb8BitQuantizer, transformers.BitsAndBytesConfig),
}
_theirs: Final[dict[str, tuple[Any, Any]]] = {}

# A name of our own, which takes nothing over.
AUTO_QUANTIZER_MAPPING["qkern"] = LoadTimeQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["qkern"] = QkernConfig


def enable() -> None:
    """Let transformers load AWQ, GPTQ and compressed-tensors checkpoints on qkern's kernels, from now on.

    What qkern does not read (other layouts of AWQ, fp8) is left to transformers, and so is bitsandbytes but
    for experts in 4 or 8 bits, which transformers does not load. A second call changes nothing.

    Raises
    ------
    UnsupportedError
        If transformers is older than 5.21.
    """
    if not hasattr(HfQuantizer, "get_new_dtype"):
        raise UnsupportedError(
            f"loading through transformers needs version 5.21 or newer: got {transformers.__version__}; "
            "update it, or use qkern.load"
        )
    for method, (quantizer, config) in _ours.items():
        if AUTO_QUANTIZER_MAPPING[method] is not quantizer:
            _theirs[method] = AUTO_QUANTIZER_MAPPING[method], AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            AUTO_QUANTIZER_MAPPING[method], AUTO_QUANTIZATION_CONFIG_MAPPING[method] = quantizer, config


def disable() -> None:
    """Give transformers its own classes back; models that are loaded already stay as they are."""
    for method, theirs in _theirs.items():
        AUTO_QUANTIZER_MAPPING[method], AUTO_QUANTIZATION_CONFIG_MAPPING[method] = theirs
    _theirs.clear()
