"""What qkern knows about each architecture, as data; adding one is adding an `Architecture` here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from qkern.nn import role

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Architecture", "LinearPair", "NormLinears", "architecture_for", "known_architectures"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormLinears:
    """A norm and every linear that reads its output, so that a factor can move from one to the others.

    Parameters
    ----------
    norm : str
        Name inside the decoder layer.
    linears : tuple of str
        Names inside the decoder layer.
    routers : tuple of str
        Likewise, of what stays 16-bit, the router that sees every token first. Nothing else may read the
        norm's output.
    """

    norm: str
    linears: tuple[str, ...]
    routers: tuple[str, ...] = ()

    @property
    def witness(self) -> str:
        """What sees all of the norm's output: an expert sees its own tokens alone."""
        return (*self.routers, *self.linears)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPair:
    """Two linears between which each channel is only multiplied, never mixed or bent.

    Parameters
    ----------
    first, second : str
        Names inside the decoder layer: rows of `first` make the columns of `second`.
    kind : str
        ``"value"``: `first` makes the values of attention, so one of its rows feeds a column in each
        query head of the group; ``"gated"``: `first` makes the factor that the activation does not touch.
    fused : bool
        `first` also makes other outputs; the channels are its last rows.
    """

    first: str
    second: str
    kind: str
    fused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder as the quantizers see it. Names below `layers` are relative to one decoder layer.

    In a mixture of experts, which are linears, ``#`` stands for the number of an expert, and layers have
    either experts or one MLP: `in_layer` says what there is in a layer.

    Parameters
    ----------
    model_type : str
        ``config.model_type``.
    layers : str
        Path of the list of decoder layers.
    embedding, final_norm, head : str
        Paths of the input embedding, the norm before the head, and the head.
    sequential : tuple of tuple of str
        Linears in the order of their execution; those in one tuple share their input.
    norm_linears : tuple of NormLinears
        Norms whose output only the named linears read.
    linear_linears : tuple of LinearPair
        Linears that can hand a factor to the next one.
    fused : tuple of tuple of str
        Linears that runtimes fuse into one, which must therefore share a scheme.
    norm_offset : float
        A norm multiplies by ``weight + norm_offset`` (1.0 where the file stores w - 1).
    conv1d : bool
        Weights are stored ``[in, out]``.
    """

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    sequential: tuple[tuple[str, ...], ...]
    norm_linears: tuple[NormLinears, ...]
    linear_linears: tuple[LinearPair, ...]
    fused: tuple[tuple[str, ...], ...] = ()
    norm_offset: float = 0.0
    conv1d: bool = False

    def in_layer(self, layer: nn.Module) -> Architecture:
        """Return the data of one layer: all its experts by number, without what the layer does not have."""
        if not any("#" in name for group in self.sequential for name in group):
            return self
        found: dict[str, list[str]] = {}
        for name, _ in layer.named_modules():
            found.setdefault(role(name), []).append(name)

        def each(names: tuple[str, ...]) -> list[tuple[str, ...]]:
            return list(zip(*(found[name] for name in names if name in found), strict=True))

        def every(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(chain.from_iterable(found.get(name, ()) for name in names))

        return replace(
            self,
            sequential=tuple(group for names in self.sequential for group in each(names)),
            norm_linears=tuple(
                replace(entry, linears=every(entry.linears), routers=every(entry.routers))
                for entry in self.norm_linears
            ),
            linear_linears=tuple(
                replace(pair, first=first, second=second)
                for pair in self.linear_linears
                for first, second in zip(found.get(pair.first, ()), found.get(pair.second, ()), strict=True)
            ),
            fused=tuple(group for names in self.fused for group in each(names)),
        )


_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT: Final = "self_attn.o_proj"
_GATE_UP: Final = ("mlp.gate_proj", "mlp.up_proj")
_DOWN: Final = "mlp.down_proj"


def _llama_like(
    model_type: str, *, mlp_norm: str = "post_attention_layernorm", norm_offset: float = 0.0
) -> Architecture:
    """Separate q, k, v, o and gate, up, down: the layout that most decoders share."""
    return Architecture(
        model_type=model_type,
        sequential=(_QKV, (_OUT,), _GATE_UP, (_DOWN,)),
        norm_linears=(
            NormLinears(norm="input_layernorm", linears=_QKV),
            NormLinears(norm=mlp_norm, linears=_GATE_UP),
        ),
        linear_linears=(
            LinearPair(first="self_attn.v_proj", second=_OUT, kind="value"),
            LinearPair(first="mlp.up_proj", second=_DOWN, kind="gated"),
        ),
        fused=(_QKV, _GATE_UP),
        norm_offset=norm_offset,
    )


def _mixture(model_type: str) -> Architecture:
    """Experts, and perhaps a shared one, in the place of gate, up and down; some layers may have these."""
    dense = _llama_like(model_type)
    shared, shared_down = (
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.shared_expert.down_proj",
    )
    experts, down = ("mlp.experts.#.gate_proj", "mlp.experts.#.up_proj"), "mlp.experts.#.down_proj"
    share = "mlp.shared_expert_gate"
    attention, mlp = dense.norm_linears
    return replace(
        dense,
        sequential=(*dense.sequential, (*shared, share), (shared_down,), experts, (down,)),
        norm_linears=(
            attention,
            replace(mlp, linears=(*mlp.linears, *shared, *experts), routers=("mlp.gate", share)),
        ),
        linear_linears=(
            *dense.linear_linears,
            LinearPair(first=shared[1], second=shared_down, kind="gated"),
            LinearPair(first=experts[1], second=down, kind="gated"),
        ),
        fused=(*dense.fused, shared),
    )


_PHI3: Final = Architecture(
    model_type="phi3",
    sequential=(("self_attn.qkv_proj",), (_OUT,), ("mlp.gate_up_proj",), (_DOWN,)),
    norm_linears=(
        NormLinears(norm="input_layernorm", linears=("self_attn.qkv_proj",)),
        NormLinears(norm="post_attention_layernorm", linears=("mlp.gate_up_proj",)),
    ),
    linear_linears=(
        LinearPair(first="self_attn.qkv_proj", second=_OUT, kind="value", fused=True),
        LinearPair(first="mlp.gate_up_proj", second=_DOWN, kind="gated", fused=True),
    ),
)

# c_fc and the MLP's c_proj have GELU between them, which no factor passes.
_GPT2: Final = Architecture(
    model_type="gpt2",
    layers="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    sequential=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    norm_linears=(
        NormLinears(norm="ln_1", linears=("attn.c_attn",)),
        NormLinears(norm="ln_2", linears=("mlp.c_fc",)),
    ),
    linear_linears=(LinearPair(first="attn.c_attn", second="attn.c_proj", kind="value", fused=True),),
    conv1d=True,
)

_KNOWN: Final[dict[str, Architecture]] = {
    entry.model_type: entry
    for entry in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        # Gemma 2 also norms what attention and MLP return; those two norms feed the residual, not linears.
        _llama_like("gemma2", mlp_norm="pre_feedforward_layernorm", norm_offset=1.0),
        _mixture("mixtral"),
        _mixture("qwen2_moe"),
        _mixture("qwen3_moe"),
        _PHI3,
        _GPT2,
    )
}


def known_architectures() -> tuple[str, ...]:
    """Model types that `architecture_for` knows."""
    return tuple(_KNOWN)


def architecture_for(config: Any) -> Architecture | None:
    """Architecture of a transformers config, or None where qkern has no data for it.

    Parameters
    ----------
    config : PretrainedConfig
        Its ``model_type`` decides; GPT-2 with cross-attention counts as unknown.
    """
    entry = _KNOWN.get(str(getattr(config, "model_type", "")))
    if entry is not None and getattr(config, "add_cross_attention", False):
        return None
    return entry
