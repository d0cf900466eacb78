"""Rotary positions in a GGUF: keys of the metadata, and tensors of factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qkern.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add_rope", "check_rope", "head_dim", "rope_parameters", "rope_tensors"]

_ORIGINAL: Final = "original_max_position_embeddings"
_ALWAYS: Final = ("rope_theta", "partial_rotary_factor")
# What each kind of scaling has besides; another key would change what llama.cpp does not know of.
_PARAMETERS: Final = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL),
}
# What transformers takes another key for that is not there; those left out are None then.
_ABSENT: Final = {"truncate": True}
_LISTS: Final = ("short_factor", "long_factor")
# Least and greatest; whole numbers where these are. Logarithms of the context divide.
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "partial_rotary_factor": (1e-6, 1.0),
    _ORIGINAL: (2, 2**32 - 1),
}
_RANGE: Final = (1e-30, 1e30)


def head_dim(config: Mapping[str, Any]) -> int:
    """Size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def check_rope(config: Mapping[str, Any], name: str, kinds: Sequence[str], *, partial: bool) -> None:
    """Refuse rotary positions that llama.cpp does not have.

    Parameters
    ----------
    config : mapping
        The configuration.
    name : str
        llama.cpp's name of the architecture.
    kinds : sequence of str
        The kinds of scaling that it has.
    partial : bool
        Whether it rotates a part of a head where the model does.

    Raises
    ------
    UnsupportedError
        If the kind of scaling is none of these, has a parameter that llama.cpp does not know, or the part of
        a head that is rotated is not what llama.cpp rotates.
    FormatError
        If a parameter is missing or no number in its range.
    """
    rope = _stored(config)
    kind = rope["rope_type"]
    if kind not in kinds:
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not exported to GGUF: allowed are {', '.join(kinds)}"
        )
    known = (*_ALWAYS, *_PARAMETERS[kind])
    strange = {key: value for key, value in rope.items() if key not in (*known, "rope_type", "type")}
    strange = {key: value for key, value in strange.items() if value != _ABSENT.get(key)}
    if strange:
        given = ", ".join(f"{key} {value!r:.60}" for key, value in strange.items())
        raise UnsupportedError(
            f"rotary scaling {kind!r} with {given} is not exported to GGUF: allowed are {', '.join(known)}; "
            "take the others out of config.json if the model does without them"
        )
    rope = rope_parameters(config)
    part, head, rotated = rope["partial_rotary_factor"], head_dim(config), _rotary_dim(config, rope)
    if part != 1 and not partial:
        raise UnsupportedError(
            f"partial_rotary_factor {part:g} is not what llama.cpp's {name} computes, which rotates "
            "whole heads: allowed is 1"
        )
    if rotated < 2 or rotated % 2:
        raise UnsupportedError(
            f"partial_rotary_factor {part:g} rotates {rotated} of the {head} of a head, and llama.cpp rotates"
            " pairs: allowed is what gives an even number"
        )
    if kind == "yarn" and rope["factor"] < 1:
        raise UnsupportedError(
            f"rotary scaling 'yarn' with factor {rope['factor']:g} is not what llama.cpp computes: allowed "
            "is at least 1"
        )


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of a kind that is exported, those that were left out filled in.

    Raises
    ------
    FormatError
        Naming the key that is missing or no number in its range.
    """
    rope = _stored(config)
    kind = rope["rope_type"]
    if kind == "default" and rope["partial_rotary_factor"] is None:  # transformers does not look there
        rope["partial_rotary_factor"] = 1.0
    if kind in ("yarn", "longrope"):
        if rope.get(_ORIGINAL) is None:
            rope[_ORIGINAL] = config.get(_ORIGINAL) or config["max_position_embeddings"]
        original = _number(rope[_ORIGINAL], _ORIGINAL)
        if rope.get("factor") is None:
            rope["factor"] = config["max_position_embeddings"] / original
        if rope.get("attention_factor") is None and kind == "longrope":
            # Longer contexts spread attention thinner.
            stretch = max(_number(rope["factor"], "factor"), 1.0)
            rope["attention_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    for key in (*_ALWAYS, *_PARAMETERS[kind]):
        if key not in _LISTS:
            rope[key] = _number(rope.get(key), key)
    for key in _LISTS if kind == "longrope" else ():
        factors, length = rope.get(key), _rotary_dim(config, rope) // 2
        if not isinstance(factors, list) or len(factors) != length:
            raise FormatError(
                f"config.json: longrope scaling needs {length} numbers in {key}: got {factors!r:.60}"
            )
        rope[key] = [_number(factor, key) for factor in factors]
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise FormatError(
            f"config.json: high_freq_factor must be above low_freq_factor, {rope['low_freq_factor']:g}: got "
            f"{rope['high_freq_factor']:g}"
        )
    return rope


def add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the rotary keys of a configuration that `check_rope` let pass."""
    import gguf

    rope = rope_parameters(config)
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(_rotary_dim(config, rope))
    scaling = {"linear": "LINEAR", "yarn": "YARN", "longrope": "LONGROPE"}.get(kind)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType[scaling])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(rope[_ORIGINAL]))
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies by the file's tensor name, each fp32 ``[rotary dim / 2]``."""
    kind = _stored(config)["rope_type"]
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config)}
    if kind != "longrope":
        return {}
    rope = rope_parameters(config)
    return {
        f"rope_factors_{length}.weight": torch.tensor(
            rope[f"{length}_factor"], dtype=torch.float32, device="cpu"
        )
        for length in ("long", "short")
    }


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form; older configurations spread them over several keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    part = config.get("partial_rotary_factor")
    rope.setdefault("partial_rotary_factor", 1.0 if part is None else part)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _number(value: Any, key: str) -> float:
    low, high = _RANGES.get(key, _RANGE)
    whole = isinstance(low, int)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value % 1):
        raise FormatError(
            f"config.json: {key} of the rotary positions must be {'an integer' if whole else 'a number'} "
            f"from {low:.10g} to {high:.10g}: got {value!r:.60}; fetch it again"
        )
    return float(value)


def _rotary_dim(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    return int(head_dim(config) * rope["partial_rotary_factor"])


def _llama3_factors(config: Mapping[str, Any]) -> Tensor:
    """Divisors of Llama 3's scaling.

    Wavelengths above ``original / low_freq_factor`` are stretched by `factor`, those below
    ``original / high_freq_factor`` are kept, and between the two the stretch is interpolated.
    """
    rope = rope_parameters(config)
    factor, low, high, original = (float(rope[key]) for key in _PARAMETERS["llama3"])
    head = head_dim(config)
    exponents = torch.arange(0, head, 2, dtype=torch.float64, device="cpu") / head
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    # The frequency is a mean of the kept and the stretched one, so its divisor is a harmonic mean.
    return (1 / ((1 - smooth) / factor + smooth)).float()
