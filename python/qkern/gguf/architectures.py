"""Architectures as GGUF knows them, as data: tensors and their changes, metadata, what llama.cpp computes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qkern.errors import UnsupportedError
from qkern.gguf.changes import PLUS_ONE, ROW_TO_VECTOR, UNCHANGED, Change, Config, rotary
from qkern.gguf.rope import add_rope, check_rope, head_dim

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ARCHITECTURES", "FusedExperts", "GGUFArchitecture", "Weight", "architecture_for"]

logger = logging.getLogger(__name__)

_HEAD: Final = "lm_head"
_EXPERT: Final = "*"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """Where experts lie in a checkpoint that has them as one 3-D parameter, as transformers has in memory.

    Parameters
    ----------
    parameter : str
        Its name in the layer.
    part, parts : int
        Which of how many equal parts of an expert's rows.
    """

    parameter: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of an architecture, with its bias.

    Parameters
    ----------
    module : str
        transformers' name; in a layer, from the layer on. ``*`` stands for the number of an expert: the file
        has all experts as one tensor.
    file : str
        llama.cpp's name, likewise.
    shape : tuple of str
        In the file; the names of `_sizes`.
    bias : str or bool
        Whether it has a bias, or the key of the configuration that says so.
    change : Change
        What is done to weight and bias on the way into the file.
    fused : FusedExperts, optional
        Another place where a checkpoint may have it.
    """

    module: str
    file: str
    shape: tuple[str, ...]
    bias: str | bool = False
    change: Change = UNCHANGED
    fused: FusedExperts | None = None

    def has_bias(self, config: Config) -> bool:
        """Whether a model with this configuration has the bias."""
        return bool(config.get(self.bias)) if isinstance(self.bias, str) else self.bias


def _sizes(config: Config) -> dict[str, int]:
    heads, head = config["num_attention_heads"], head_dim(config)
    keys = (config.get("num_key_value_heads") or heads) * head
    inner = config["intermediate_size"]
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "inner": inner,
        "gate and up": 2 * inner,
        "head": head,
        "queries": heads * head,
        "keys": keys,
        "q, k and v": heads * head + 2 * keys,
        "experts": expert_count(config),
        "expert inner": config.get("moe_intermediate_size") or inner,
        "shared inner": config.get("shared_expert_intermediate_size") or 0,
        "positions": config.get("max_position_embeddings") or 0,
        "token types": config.get("type_vocab_size") or 0,
    }


def expert_count(config: Config) -> int:
    """Experts of a layer; 0 in a dense model."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


Demands = Mapping[str, tuple[Any, ...]]
"""Keys of a configuration and the values that llama.cpp computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """How one transformers architecture is written to GGUF.

    Parameters
    ----------
    model_type : str
        transformers' name.
    name : str
        llama.cpp's name.
    first, layer, last : tuple of Weight
        The weights before the layers, of each layer, and after them, in the order of the file.
    metadata : tuple of callable
        Each writes some keys, given a ``gguf.GGUFWriter`` and the configuration.
    demands : callable
        From the configuration to what llama.cpp demands of it.
    layers : str
        What transformers' names of a layer begin with, before its number.
    rope : tuple of str
        Kinds of rotary scaling that llama.cpp has for it; none: no rotary positions.
    partial_rope : bool
        Whether llama.cpp rotates a part of a head where the model does.
    renames : tuple of (str, str)
        Regular expressions and replacements from names of older or other checkpoints to transformers' own.
    ignored : tuple of str
        Regular expressions of tensors that a checkpoint may have and the file does not.
    is_encoder : bool
        It gives embeddings, not logits; how they are pooled is ``config["pooling"]``.
    ties_head : bool
        llama.cpp takes the embedding for the head where the file has none.
    """

    model_type: str
    name: str
    first: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    last: tuple[Weight, ...]
    metadata: tuple[Callable[[Any, Config], None], ...]
    demands: Callable[[Config], Demands]
    layers: str = "model.layers."
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    # Files of a bare decoder leave the prefix out.
    renames: tuple[tuple[str, str], ...] = ((rf"^(?!model\.|{_HEAD}\.)", "model."),)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$", r"self_attn\.masked_bias$")
    is_encoder: bool = False
    ties_head: bool = True
    _weights: dict[str, Weight] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = {weight.module: weight for weight in (*self.first, *self.layer, *self.last)}
        object.__setattr__(self, "_weights", found)

    def _walk(self, config: Config) -> Iterator[tuple[str, str, Weight]]:
        """Yield every tensor's name here, name in the file, and weight, in the order of the file."""
        groups = [("", "", self.first)]
        groups += [
            (f"{self.layers}{layer}.", f"blk.{layer}.", self.layer)
            for layer in range(config["num_hidden_layers"])
        ]
        for prefix, file_prefix, weights in (*groups, ("", "", self.last)):
            for weight in weights:
                yield f"{prefix}{weight.module}.weight", f"{file_prefix}{weight.file}.weight", weight
                if weight.has_bias(config):
                    yield f"{prefix}{weight.module}.bias", f"{file_prefix}{weight.file}.bias", weight

    def shapes(self, config: Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """Shape in the file of every tensor of the model, by transformers' name and in the order of the file.

        All experts are one tensor, in whose name ``*`` stands for an expert's number.

        Raises
        ------
        UnsupportedError
            If the model has a head of its own, and llama.cpp's architecture has no tensor for it.
        """
        if not (tied or self.is_encoder or _HEAD in self._weights):
            raise UnsupportedError(
                f"{_HEAD}.weight differs from the embedding, which llama.cpp's {self.name} takes for the head"
            )
        sizes = _sizes(config)
        shapes = {}
        for name, _, weight in self._walk(config):
            shape = tuple(sizes[size] for size in weight.shape)
            if not (tied and weight.module == _HEAD):
                shapes[name] = shape[:1] if name.endswith(".bias") else shape
        return shapes

    def names(self, config: Config) -> dict[str, str]:
        """Map transformers' tensor names to llama.cpp's; the names are those of `shapes`."""
        return {name: file_name for name, file_name, _ in self._walk(config)}

    def weight_of(self, name: str) -> Weight:
        """Look the weight up that a tensor of `shapes` is, or is the bias of."""
        module, _, _ = name.rpartition(".")
        return self._weights[re.sub(rf"^{re.escape(self.layers)}\d+\.", "", module)]

    def pieces(self, name: str, experts: int) -> list[str]:
        """Names of the tensors that a checkpoint has for a tensor of `shapes`: one, or one an expert."""
        if _EXPERT not in name:
            return [name]
        return [name.replace(_EXPERT, str(expert)) for expert in range(experts)]

    def fused_name(self, name: str) -> str | None:
        """Name of the parameter that may hold all experts instead of `pieces`."""
        weight = self.weight_of(name)
        if weight.fused is None:
            return None
        return name.removesuffix(f"{weight.module}.weight") + weight.fused.parameter

    def own_name(self, stored: str) -> str | None:
        """Return transformers' name of a checkpoint's tensor; None if the file has no such tensor."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return None if any(re.search(pattern, stored) for pattern in self.ignored) else stored

    def to_file_order(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """Change a tensor of `shapes` into that of the file."""
        return self.weight_of(name).change.to_file(tensor, config)

    def from_file_order(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """Undo `to_file_order`."""
        return self.weight_of(name).change.from_file(tensor, config)

    @property
    def has_experts(self) -> bool:
        """Whether its layers choose among experts."""
        return any(_EXPERT in weight.module for weight in self.layer)

    def check(self, config: Config) -> None:
        """Refuse a model that uses what llama.cpp does not compute for this architecture.

        Raises
        ------
        UnsupportedError
            Naming the key of the configuration.
        FormatError
            If a rotary parameter is missing or no number in its range.
        """
        for key, allowed in self.demands(config).items():
            if config.get(key) not in allowed:
                raise UnsupportedError(
                    f"{key} {config.get(key)!r} is not what llama.cpp's {self.name} computes: allowed is "
                    f"{' or '.join(map(repr, allowed))}"
                )
        if self.rope:
            check_rope(config, self.name, self.rope, partial=self.partial_rope)

    def add_metadata(self, writer: Any, config: Config) -> None:
        """Write the hyperparameters of a configuration that `check` let pass."""
        for write in self.metadata:
            write(writer, config)
        if self.rope:
            add_rope(writer, config)


def _add_sizes(writer: Any, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])


def _add_decoder(writer: Any, config: Config) -> None:
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_experts(writer: Any, config: Config) -> None:
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _warn_of_window(_: Any, config: Config) -> None:
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        logger.warning(
            "sliding_window %d is not written: llama.cpp attends to all positions; results differ beyond it",
            window,
        )


def _add_gemma2(writer: Any, config: Config) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"] or config["max_position_embeddings"])


def _add_encoder(writer: Any, config: Config) -> None:
    import gguf

    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_pooling_type(gguf.PoolingType[config["pooling"].upper()])


def _demand_silu(config: Config) -> Demands:
    return {"hidden_act": ("silu",)}


def _demand_no_bias(config: Config) -> Demands:
    return {"hidden_act": ("silu",), "attention_bias": (False, None)}


def _demand_all_experts(config: Config) -> Demands:
    return {"hidden_act": ("silu",), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def _demand_gemma2(config: Config) -> Demands:
    layers = config["num_hidden_layers"]
    # llama.cpp knows the 27B model, which scales otherwise, by its number of layers.
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == 46 else head_dim(config)
    return {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False, None),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (False, None),
        "query_pre_attn_scalar": (scale,),
        "attn_logit_softcapping": (config.get("attn_logit_softcapping") or 50.0,),
        "final_logit_softcapping": (config.get("final_logit_softcapping") or 30.0,),
        "layer_types": ([("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],),
    }


def _demand_bert(config: Config) -> Demands:
    return {
        "hidden_act": ("gelu",),
        "is_decoder": (False, None),
        "position_embedding_type": ("absolute", None),
        "architectures": (None, ["BertModel"], ["BertForMaskedLM"], ["BertForPreTraining"]),
    }


_EMBEDDING: Final = (Weight("model.embed_tokens", "token_embd", ("vocab", "hidden")),)
_NORM: Final = Weight("model.norm", "output_norm", ("hidden",))
_LAST: Final = (_NORM, Weight(_HEAD, "output", ("vocab", "hidden")))
_ATTENTION_NORM: Final = Weight("input_layernorm", "attn_norm", ("hidden",))
_FFN_NORM: Final = Weight("post_attention_layernorm", "ffn_norm", ("hidden",))
_QK_NORM: Final = (
    Weight("self_attn.q_norm", "attn_q_norm", ("head",)),
    Weight("self_attn.k_norm", "attn_k_norm", ("head",)),
)
_EXPERTS: Final = (
    Weight("mlp.gate", "ffn_gate_inp", ("experts", "hidden")),
    Weight(
        "mlp.experts.*.gate_proj",
        "ffn_gate_exps",
        ("experts", "expert inner", "hidden"),
        fused=FusedExperts("mlp.experts.gate_up_proj", 0, 2),
    ),
    Weight(
        "mlp.experts.*.up_proj",
        "ffn_up_exps",
        ("experts", "expert inner", "hidden"),
        fused=FusedExperts("mlp.experts.gate_up_proj", 1, 2),
    ),
    Weight(
        "mlp.experts.*.down_proj",
        "ffn_down_exps",
        ("experts", "hidden", "expert inner"),
        fused=FusedExperts("mlp.experts.down_proj"),
    ),
)
_SHARED_EXPERT: Final = (
    Weight("mlp.shared_expert.gate_proj", "ffn_gate_shexp", ("shared inner", "hidden")),
    Weight("mlp.shared_expert.up_proj", "ffn_up_shexp", ("shared inner", "hidden")),
    Weight("mlp.shared_expert.down_proj", "ffn_down_shexp", ("hidden", "shared inner")),
    Weight("mlp.shared_expert_gate", "ffn_gate_inp_shexp", ("hidden",), change=ROW_TO_VECTOR),
)


def _attention(
    *, bias: str | bool = False, output_bias: str | bool = False, interleaved: bool = False
) -> tuple[Weight, ...]:
    q, k = (
        (rotary("num_attention_heads"), rotary("num_key_value_heads"))
        if interleaved
        else (UNCHANGED, UNCHANGED)
    )
    return (
        Weight("self_attn.q_proj", "attn_q", ("queries", "hidden"), bias, q),
        Weight("self_attn.k_proj", "attn_k", ("keys", "hidden"), bias, k),
        Weight("self_attn.v_proj", "attn_v", ("keys", "hidden"), bias),
        Weight("self_attn.o_proj", "attn_output", ("hidden", "queries"), output_bias),
    )


def _ffn(bias: str | bool = False) -> tuple[Weight, ...]:
    return (
        Weight("mlp.gate_proj", "ffn_gate", ("inner", "hidden"), bias),
        Weight("mlp.up_proj", "ffn_up", ("inner", "hidden"), bias),
        Weight("mlp.down_proj", "ffn_down", ("hidden", "inner"), bias),
    )


def _decoder(model_type: str, name: str, *layer: Weight, **settings: Any) -> GGUFArchitecture:
    """Describe a decoder: an architecture with the defaults that most have."""
    settings = {
        "first": _EMBEDDING,
        "layer": layer,
        "last": _LAST,
        "metadata": (_add_sizes, _add_decoder, _warn_of_window),
        "demands": _demand_silu,
        **settings,
    }
    return GGUFArchitecture(model_type=model_type, name=name, **settings)


def _norm_plus_one(module: str, file: str) -> Weight:
    return Weight(module, file, ("hidden",), change=PLUS_ONE)


_LLAMA_ROPE: Final = ("default", "linear", "yarn", "llama3")
_LLAMA_LAYER: Final = (
    _ATTENTION_NORM,
    *_attention(bias="attention_bias", output_bias="attention_bias", interleaved=True),
    *_ffn("mlp_bias"),
    _FFN_NORM,
)
_ALL: Final = (
    _decoder("llama", "llama", *_LLAMA_LAYER, rope=_LLAMA_ROPE),
    _decoder("mistral", "llama", *_LLAMA_LAYER, rope=_LLAMA_ROPE),
    _decoder("qwen2", "qwen2", _ATTENTION_NORM, *_attention(bias=True), *_ffn(), _FFN_NORM),
    _decoder(
        "qwen3",
        "qwen3",
        _ATTENTION_NORM,
        *_attention(),
        *_ffn(),
        *_QK_NORM,
        _FFN_NORM,
        demands=_demand_no_bias,
    ),
    _decoder(
        "mixtral",
        "llama",
        _ATTENTION_NORM,
        *_attention(interleaved=True),
        _FFN_NORM,
        *_EXPERTS,
        metadata=(_add_sizes, _add_decoder, _add_experts, _warn_of_window),
        rope=_LLAMA_ROPE,
        renames=(
            (rf"^(?!model\.|{_HEAD}\.)", "model."),
            (r"\.block_sparse_moe\.", ".mlp."),
            (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
            (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
            (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        ),
    ),
    _decoder(
        "qwen2_moe",
        "qwen2moe",
        _ATTENTION_NORM,
        *_attention(bias="qkv_bias"),
        _FFN_NORM,
        *_EXPERTS,
        *_SHARED_EXPERT,
        metadata=(_add_sizes, _add_decoder, _add_experts, _warn_of_window),
        demands=lambda config: {**_demand_all_experts(config), "norm_topk_prob": (False,)},
        ties_head=False,
    ),
    _decoder(
        "qwen3_moe",
        "qwen3moe",
        _ATTENTION_NORM,
        *_attention(),
        *_QK_NORM,
        _FFN_NORM,
        *_EXPERTS,
        metadata=(_add_sizes, _add_decoder, _add_experts, _warn_of_window),
        demands=lambda config: {
            **_demand_all_experts(config),
            **_demand_no_bias(config),
            "norm_topk_prob": (True,),
        },
    ),
    _decoder(
        "gemma2",
        "gemma2",
        _norm_plus_one("input_layernorm", "attn_norm"),
        *_attention(),
        *_ffn(),
        _norm_plus_one("post_attention_layernorm", "post_attention_norm"),
        _norm_plus_one("pre_feedforward_layernorm", "ffn_norm"),
        _norm_plus_one("post_feedforward_layernorm", "post_ffw_norm"),
        last=(_norm_plus_one("model.norm", "output_norm"),),
        metadata=(_add_sizes, _add_decoder, _add_gemma2),
        demands=_demand_gemma2,
        rope=("default",),
    ),
    _decoder(
        "phi3",
        "phi3",
        _ATTENTION_NORM,
        Weight("self_attn.qkv_proj", "attn_qkv", ("q, k and v", "hidden")),
        Weight("self_attn.o_proj", "attn_output", ("hidden", "queries")),
        Weight("mlp.gate_up_proj", "ffn_up", ("gate and up", "hidden")),
        Weight("mlp.down_proj", "ffn_down", ("hidden", "inner")),
        _FFN_NORM,
        rope=("default", "longrope"),
        partial_rope=True,
    ),
    GGUFArchitecture(
        model_type="bert",
        name="bert",
        first=(
            Weight("embeddings.word_embeddings", "token_embd", ("vocab", "hidden")),
            Weight("embeddings.position_embeddings", "position_embd", ("positions", "hidden")),
            Weight("embeddings.token_type_embeddings", "token_types", ("token types", "hidden")),
            Weight("embeddings.LayerNorm", "token_embd_norm", ("hidden",), bias=True),
        ),
        layer=(
            Weight("attention.self.query", "attn_q", ("queries", "hidden"), bias=True),
            Weight("attention.self.key", "attn_k", ("keys", "hidden"), bias=True),
            Weight("attention.self.value", "attn_v", ("keys", "hidden"), bias=True),
            Weight("attention.output.dense", "attn_output", ("hidden", "queries"), bias=True),
            Weight("attention.output.LayerNorm", "attn_output_norm", ("hidden",), bias=True),
            Weight("intermediate.dense", "ffn_up", ("inner", "hidden"), bias=True),
            Weight("output.dense", "ffn_down", ("hidden", "inner"), bias=True),
            Weight("output.LayerNorm", "layer_output_norm", ("hidden",), bias=True),
        ),
        last=(),
        metadata=(_add_sizes, _add_encoder),
        demands=_demand_bert,
        layers="encoder.layer.",
        is_encoder=True,
        rope=(),
        renames=(
            (r"^bert\.", ""),
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        # The file gives embeddings of tokens: what was trained on top of them is no part of it.
        ignored=(r"^embeddings\.position_ids$", r"^pooler\.", r"^cls\."),
    ),
)
ARCHITECTURES: Final = {architecture.model_type: architecture for architecture in _ALL}


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
