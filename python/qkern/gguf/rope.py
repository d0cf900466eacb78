"""Rotary positions in a GGUF: keys of the metadata, and tensors of factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add_rope", "head_dim", "rope_parameters", "rope_tensors"]


def head_dim(config: Mapping[str, Any]) -> int:
    """Size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form; older configurations spread them over several keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def add_rope(writer: Any, config: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Write the rotary keys.

    Raises
    ------
    UnsupportedError
        If the kind of scaling is not among those that llama.cpp has for the architecture.
    FormatError
        If the configuration lacks a parameter of the scaling.
    """
    import gguf

    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in allowed:
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not exported to GGUF: allowed are {', '.join(allowed)}"
        )
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(_rotary_dim(config))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_parameter(rope, "factor"))
    elif kind == "yarn":
        changed = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        changed = {key for key in changed if rope.get(key) is not None}
        if changed:
            raise UnsupportedError(f"yarn scaling with {', '.join(sorted(changed))} is not exported to GGUF")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(_parameter(rope, "factor"))
        writer.add_rope_scaling_orig_ctx_len(_original_context(config))
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(_original_context(config))
        writer.add_rope_scaling_attn_factors(_longrope_attention(config))


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies by the file's tensor name, each fp32 ``[rotary dim / 2]``."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config)}
    if rope["rope_type"] != "longrope":
        return {}
    tensors = {}
    for length in ("long", "short"):
        factors = rope.get(f"{length}_factor")
        if not isinstance(factors, list) or len(factors) != _rotary_dim(config) // 2:
            raise FormatError(
                f"config.json: longrope scaling needs {_rotary_dim(config) // 2} numbers in {length}_factor: "
                f"got {factors!r}"
            )
        tensors[f"rope_factors_{length}.weight"] = torch.tensor(factors, dtype=torch.float32, device="cpu")
    return tensors


def _rotary_dim(config: Mapping[str, Any]) -> int:
    return int(head_dim(config) * rope_parameters(config)["partial_rotary_factor"])


def _parameter(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, (int, float)):
        raise FormatError(
            f"config.json: {rope['rope_type']} rotary scaling needs a number {key}: got {value!r}"
        )
    return float(value)


def _original_context(config: Mapping[str, Any]) -> int:
    """Positions that the model was first trained for."""
    original = rope_parameters(config).get("original_max_position_embeddings")
    return int(
        original or config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )


def _longrope_attention(config: Mapping[str, Any]) -> float:
    """Return what queries and keys are multiplied by; longer contexts spread attention thinner."""
    rope = rope_parameters(config)
    if rope.get("attention_factor") is not None:
        return _parameter(rope, "attention_factor")
    original = _original_context(config)
    stretch = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _llama3_factors(config: Mapping[str, Any]) -> Tensor:
    """Divisors of Llama 3's scaling.

    Wavelengths above ``original / low_freq_factor`` are stretched by `factor`, those below
    ``original / high_freq_factor`` are kept, and between the two the stretch is interpolated.
    """
    rope = rope_parameters(config)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_parameter(rope, key) for key in keys)
    head = head_dim(config)
    exponents = torch.arange(0, head, 2, dtype=torch.float64, device="cpu") / head
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    # The frequency is a mean of the kept and the stretched one, so its divisor is a harmonic mean.
    return (1 / ((1 - smooth) / factor + smooth)).float()
