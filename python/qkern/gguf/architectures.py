"""Architectures as GGUF knows them: names and shapes of tensors, metadata, and the order of rotary rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from qkern.errors import FormatError, UnsupportedError

__all__ = ["ARCHITECTURES", "GGUFArchitecture", "architecture_for"]

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]
"""A transformers configuration as a dictionary, defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """How one transformers architecture is written to GGUF.

    Parameters
    ----------
    model_type : str
        transformers' name.
    name : str
        llama.cpp's name.
    interleaved_rope : bool
        llama.cpp rotates neighbouring pairs of rows of q and k, transformers the two halves of a head: the
        rows are reordered.
    qk_norm : bool
        Queries and keys are normalized a head.
    qkv_bias : bool
        q, k and v always have a bias.
    optional_bias : bool
        llama.cpp reads the biases that ``attention_bias`` switches on.
    """

    model_type: str
    name: str
    interleaved_rope: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    optional_bias: bool = True

    def shapes(self, config: Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by transformers' name, in the order of the file."""
        hidden, inner, head = config["hidden_size"], config["intermediate_size"], head_dim(config)
        queries = config["num_attention_heads"] * head
        keys = config["num_key_value_heads"] * head
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
        for layer in range(config["num_hidden_layers"]):
            matrices = {
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            prefix = f"model.layers.{layer}."
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            for module, shape in matrices.items():
                shapes[f"{prefix}{module}.weight"] = shape
                if self._has_bias(module, config):
                    shapes[f"{prefix}{module}.bias"] = shape[:1]
            if self.qk_norm:
                shapes[f"{prefix}self_attn.q_norm.weight"] = (head,)
                shapes[f"{prefix}self_attn.k_norm.weight"] = (head,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not tied:
            shapes["lm_head.weight"] = (config["vocab_size"], hidden)
        return shapes

    def _has_bias(self, module: str, config: Config) -> bool:
        if module.startswith("mlp."):
            return bool(config.get("mlp_bias"))
        if self.qkv_bias:
            return not module.endswith("o_proj")
        return bool(config.get("attention_bias"))

    def names(self, config: Config) -> dict[str, str]:
        """Map transformers' tensor names to llama.cpp's."""
        import gguf

        number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        table = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
        names = {}
        for name in self.shapes(config, tied=False):
            mapped = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if mapped is None:
                raise UnsupportedError(
                    f"the gguf package has no name for {name} of {self.name}; upgrade gguf"
                )
            names[name] = mapped
        return names

    def to_file_order(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """Reorder the rows of a rotary projection (weight or bias) as llama.cpp wants them."""
        heads = self._rotary_heads(name, config)
        if heads is None:
            return tensor
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def from_file_order(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """Undo `to_file_order`."""
        heads = self._rotary_heads(name, config)
        if heads is None:
            return tensor
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def _rotary_heads(self, name: str, config: Config) -> int | None:
        if self.interleaved_rope and ".q_proj." in name:
            return int(config["num_attention_heads"])
        if self.interleaved_rope and ".k_proj." in name:
            return int(config["num_key_value_heads"])
        return None

    def add_metadata(self, writer: Any, config: Config) -> None:
        """Write the hyperparameters.

        Raises
        ------
        UnsupportedError
            If the model uses what llama.cpp does not compute for this architecture.
        """
        if config["hidden_act"] != "silu":
            raise UnsupportedError(
                f"hidden_act {config['hidden_act']!r}: llama.cpp's {self.name} has silu only"
            )
        if config.get("attention_bias") and not self.optional_bias:
            raise UnsupportedError(
                f"attention_bias is true, but llama.cpp's {self.name} has no biases and cannot load it"
            )
        head = head_dim(config)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(head)
        writer.add_vocab_size(config["vocab_size"])
        _add_rope(writer, config)
        _warn_of_window(config)


ARCHITECTURES: Final[dict[str, GGUFArchitecture]] = {
    architecture.model_type: architecture
    for architecture in (
        GGUFArchitecture(model_type="llama", name="llama", interleaved_rope=True),
        GGUFArchitecture(model_type="mistral", name="llama", interleaved_rope=True),
        GGUFArchitecture(model_type="qwen2", name="qwen2", qkv_bias=True),
        GGUFArchitecture(model_type="qwen3", name="qwen3", qk_norm=True, optional_bias=False),
    )
}


def architecture_for(model_type: str) -> GGUFArchitecture:
    """Look an architecture up by transformers' ``model_type``.

    Raises
    ------
    UnsupportedError
        If it is not exported.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedError(
            f"model_type {model_type!r} is not exported to GGUF: allowed are {', '.join(ARCHITECTURES)}"
        )
    return architecture


def head_dim(config: Config) -> int:
    """Size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Config) -> dict[str, Any]:
    """Rotary parameters in one form; older configurations spread them over several keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _add_rope(writer: Any, config: Config) -> None:
    import gguf

    rope = rope_parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        changed = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        changed = {key for key in changed if rope.get(key) is not None}
        if changed:
            raise UnsupportedError(f"yarn scaling with {', '.join(sorted(changed))} is not exported to GGUF")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind not in ("default", "llama3"):  # llama3 is written as a tensor of factors
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not exported to GGUF: allowed are default, linear, yarn, llama3"
        )


def rope_factors(config: Config) -> Tensor | None:
    """Divisors of the rotary frequencies for Llama 3 scaling, fp32 ``[head_dim / 2]``; None without it.

    Wavelengths above ``original / low_freq_factor`` are stretched by `factor`, those below
    ``original / high_freq_factor`` are kept, and between the two the stretch is interpolated.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    try:
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(rope["original_max_position_embeddings"])
    except KeyError as missing:
        raise FormatError(f"config.json: llama3 rotary scaling without {missing}; add it") from None
    head = head_dim(config)
    exponents = torch.arange(0, head, 2, dtype=torch.float64, device="cpu") / head
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    # The frequency is a mean of the kept and the stretched one, so its divisor is a harmonic mean.
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _warn_of_window(config: Config) -> None:
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        logger.warning(
            "sliding_window %d is not written: llama.cpp attends to all positions; results differ beyond it",
            window,
        )
