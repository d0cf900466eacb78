"""Which tensor gets which type: llama.cpp's mixtures, by their names.

A mixture is a base type and rules for some kinds of tensors. The rules are what ``llama-quantize`` does, so
that a name promises the same file everywhere; tests/gguf/test_mixture_llama_cpp.py asks llama.cpp itself.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qkern.errors import InputError, UnsupportedError
from qkern.gguf.architectures import expert_count
from qkern.gguf.overrides import check_overrides, override_for
from qkern.ops.gguf_types import GGUFType, gguf_type

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from qkern.gguf.overrides import Override

__all__ = ["ALIASES", "MIXTURES", "Mixture", "ModelFacts", "Place", "Rule", "choose_types", "mixture_for"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What rules ask about a model.

    Parameters
    ----------
    architecture : str
        llama.cpp's name.
    layers : int
        Decoder or encoder layers.
    heads : int
        Query heads.
    value_heads : int
        Key and value heads.
    experts : int
        Experts of a layer; 0 in a dense model.
    importance : bool
        Whether an importance matrix weighs the encoders' errors.
    """

    architecture: str
    layers: int
    heads: int
    value_heads: int
    experts: int = 0
    importance: bool = False

    @classmethod
    def from_config(
        cls, architecture: str, config: Mapping[str, Any], *, importance: bool = False
    ) -> ModelFacts:
        """Take them from a transformers configuration; `architecture` is llama.cpp's name."""
        heads = config["num_attention_heads"]
        return cls(
            architecture=architecture,
            layers=config["num_hidden_layers"],
            heads=heads,
            value_heads=config.get("num_key_value_heads") or heads,
            experts=expert_count(config),
            importance=importance,
        )

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the model for one of 70 billion parameters."""
        if self.layers != 80 or self.experts == 8:
            return False
        return self.architecture == "qwen2" or (
            self.architecture == "llama" and self.heads != self.value_heads
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands.

    Parameters
    ----------
    index : int
        Its number among those of its kind.
    count : int
        How many of them there are.
    model : ModelFacts
        The model.
    """

    index: int
    count: int
    model: ModelFacts


def _anywhere(_: Place) -> bool:
    return True


def _more_bits(place: Place) -> bool:
    """Whether a layer is one of the sensitive ones: the first and last eighth, and each third between."""
    index, eighth = place.index, place.count // 8
    return index < eighth or index >= 7 * place.count // 8 or (index - eighth) % 3 == 2


def _first(count: int) -> Callable[[Place], bool]:
    return lambda place: place.index < count


def _first_part(parts: int) -> Callable[[Place], bool]:
    return lambda place: place.index < place.count // parts


def _grouped(place: Place) -> bool:
    """Whether four query heads or more share a value head: its matrix is small, and much hangs on it."""
    return place.model.heads // place.model.value_heads >= 4


def _of_eight_experts(place: Place) -> bool:
    return place.model.experts == 8


def _early_with_importance(place: Place) -> bool:
    return place.model.importance and _first_part(8)(place)


def _early_without_importance(place: Place) -> bool:
    return not place.model.importance and _first_part(8)(place)


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of a kind that get another type than the base in some places.

    Parameters
    ----------
    kind : str
        Kind of tensor, such as ``"attn_v"``.
    type : str
        The type they get.
    where : callable
        From the place of a tensor to whether the rule holds; of several that hold the first counts.
    """

    kind: str
    type: str
    where: Callable[[Place], bool] = _anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a name such as ``q4_k_m`` means.

    Parameters
    ----------
    name : str
        llama.cpp's name in lower case.
    base : str
        Type of every matrix that no rule names.
    file_type : int
        Number of the mixture in the file's metadata (``general.file_type``).
    rules : tuple of Rule
        Exceptions.
    needs_importance : bool
        Whether a layer's matrix of the base type is refused without an importance matrix.
    """

    name: str
    base: str
    file_type: int
    rules: tuple[Rule, ...] = ()
    needs_importance: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the base type has blocks; the others hold one type throughout."""
        return gguf_type(self.base).block > 1

    @property
    def output(self) -> str:
        """Type of the output matrix, or of the embedding where the two are tied."""
        return "q6_k" if self.is_quantized and self.base != "q8_0" else self.base


# Attention is a small part of a model of eight experts, and its output passes through all of them.
_OUTPUT_OF_EXPERTS: Final = Rule("attn_output", "q5_k", _of_eight_experts)
_MORE_BITS: Final = (Rule("attn_v", "q6_k", _more_bits), Rule("ffn_down", "q6_k", _more_bits))
_IQ4: Final = (
    Rule("attn_v", "q5_k", _grouped),
    Rule("ffn_down", "q5_k", _early_without_importance),
    _OUTPUT_OF_EXPERTS,
)

_ALL: Final = (
    Mixture(name="f32", base="f32", file_type=0),
    Mixture(name="f16", base="f16", file_type=1),
    Mixture(name="bf16", base="bf16", file_type=32),
    Mixture(name="q4_0", base="q4_0", file_type=2, rules=(Rule("ffn_down", "q4_1", _early_with_importance),)),
    Mixture(name="q4_1", base="q4_1", file_type=3),
    Mixture(name="q5_0", base="q5_0", file_type=8, rules=(Rule("ffn_down", "q5_1", _early_with_importance),)),
    Mixture(name="q5_1", base="q5_1", file_type=9),
    Mixture(name="q8_0", base="q8_0", file_type=7),
    Mixture(
        name="q2_k",
        base="q2_k",
        file_type=10,
        rules=(
            Rule("attn_v", "q4_k", _grouped),
            Rule("attn_v", "q3_k"),
            Rule("ffn_down", "q3_k"),
            _OUTPUT_OF_EXPERTS,
            Rule("attn_output", "q3_k"),
        ),
    ),
    Mixture(
        name="q2_k_s",
        base="q2_k",
        file_type=21,
        rules=(Rule("attn_v", "q4_k", _grouped), Rule("ffn_down", "q4_k", _first_part(8))),
        needs_importance=True,
    ),
    Mixture(name="q3_k_s", base="q3_k", file_type=11, rules=(_OUTPUT_OF_EXPERTS,)),
    Mixture(
        name="q3_k_m",
        base="q3_k",
        file_type=12,
        rules=(
            Rule("attn_v", "q5_k", _first(2)),
            Rule("attn_v", "q4_k"),
            Rule("ffn_down", "q5_k", _first_part(16)),
            Rule("ffn_down", "q4_k"),
            _OUTPUT_OF_EXPERTS,
            Rule("attn_output", "q4_k"),
        ),
    ),
    Mixture(
        name="q3_k_l",
        base="q3_k",
        file_type=13,
        rules=(
            Rule("attn_v", "q5_k"),
            Rule("ffn_down", "q5_k"),
            Rule("attn_output", "q3_k", _of_eight_experts),
            Rule("attn_output", "q5_k"),
        ),
    ),
    Mixture(
        name="q4_k_s",
        base="q4_k",
        file_type=14,
        rules=(
            Rule("attn_v", "q5_k", _first(4)),
            Rule("ffn_down", "q5_k", _first_part(8)),
            _OUTPUT_OF_EXPERTS,
        ),
    ),
    Mixture(name="q4_k_m", base="q4_k", file_type=15, rules=(*_MORE_BITS, _OUTPUT_OF_EXPERTS)),
    Mixture(name="q5_k_s", base="q5_k", file_type=16),
    Mixture(name="q5_k_m", base="q5_k", file_type=17, rules=_MORE_BITS),
    Mixture(name="q6_k", base="q6_k", file_type=18),
    Mixture(name="iq4_nl", base="iq4_nl", file_type=25, rules=_IQ4),
    Mixture(name="iq4_xs", base="iq4_xs", file_type=30, rules=_IQ4),
)
MIXTURES: Final[dict[str, Mixture]] = {mixture.name: mixture for mixture in _ALL}
ALIASES: Final = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# Come before the rules of every quantized mixture.
_EXPERT_RULES: Final = (
    Rule("attn_v", "q8_0", _of_eight_experts),
    Rule("attn_k", "q8_0", _of_eight_experts),
)
# In a model of 70 billion parameters eight query heads share each value head.
_VALUES_OF_70B: Final = {"q3_k": "q5_k", "q4_k": "q5_k"}

# Types with large blocks, and what a row gets that they do not divide.
_FALLBACKS: Final = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}

# The matrices before the first layer and after the last.
_ENDS: Final = ("token_embd", "output")
# What the name of a tensor has in it, and its kind; matrices that hold values count as values.
_KINDS: Final = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_output.weight": "attn_output",
    "ffn_down": "ffn_down",
}
# Matrices that are too small, or matter too much, to be stored in fewer bits.
_KEPT: Final = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
_LAYER: Final = re.compile(r"blk\.(\d+)\.")


def mixture_for(name: str) -> Mixture:
    """Look a mixture up by its name, in any case; ``q4_k`` is ``q4_k_m``.

    Raises
    ------
    UnsupportedError
        If the name is known to nobody or not offered; the message lists what is.
    """
    lower = name.lower()
    mixture = MIXTURES.get(ALIASES.get(lower, lower))
    if mixture is None:
        allowed = ", ".join((*MIXTURES, *(f"{alias} (= {full})" for alias, full in ALIASES.items())))
        raise UnsupportedError(f"unknown GGUF type: got {name!r}, allowed are {allowed}")
    return mixture


def choose_types(
    mixture: Mixture,
    shapes: Mapping[str, tuple[int, ...]],
    model: ModelFacts,
    *,
    overrides: Sequence[Override] = (),
    pure: bool | Container[str] = False,
) -> dict[str, GGUFType]:
    """Types of all tensors of a file.

    Parameters
    ----------
    mixture : Mixture
        The mixture of the file.
    shapes : mapping
        From llama.cpp's name of each tensor, such as ``blk.0.attn_v.weight``, to its shape as torch has it.
    model : ModelFacts
        What the rules depend on.
    overrides : sequence of Override
        Types of tensors by name; they come before the mixture, whose rules then do not count these tensors.
    pure : bool or container of str
        The base type for every matrix, or for those with these names, that no override decides.

    Returns
    -------
    dict
        From name to type: f32 for vectors, norms and routers; else a type whose blocks divide the rows.

    Raises
    ------
    InputError
        If the mixture needs an importance matrix and there is none, or an override fits no tensor or not the
        rows of one.
    """
    is_tied = "output.weight" not in shapes
    counts = Counter(_kind(name) for name in shapes)
    seen: Counter[str] = Counter()
    fallbacks: Counter[tuple[GGUFType, GGUFType]] = Counter()
    types = {}
    # In llama.cpp's order, not the file's: rules count the tensors that came before.
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        if not _is_quantized(name, shapes[name]):
            types[name] = gguf_type("f32")
            continue
        K = shapes[name][-1]
        override = override_for(name, overrides)
        if override is not None:
            types[name] = override.checked_type(name, K)
            continue
        kind = _kind(name)
        if pure is True or (pure is not False and name in pure):
            wanted = mixture.base
        elif kind == "output" or (is_tied and kind == "token_embd"):
            wanted = mixture.output
        else:
            # Of experts a layer may have several matrices.
            by_layer = kind == "ffn_down" and model.experts > 1
            place = Place(
                index=_layer(name) if by_layer else seen[kind],
                count=counts[kind] if kind == "attn_v" else model.layers,
                model=model,
            )
            wanted = _wanted(mixture, kind, place)
        seen[kind] += 1
        types[name] = _fitting(gguf_type(wanted), K)
        if types[name].name != wanted:
            fallbacks[gguf_type(wanted), types[name]] += 1
    check_overrides(overrides, {name: _is_quantized(name, shape) for name, shape in shapes.items()})
    if mixture.needs_importance and not model.importance:
        _refuse_without_importance(mixture, types)
    for (before, after), count in fallbacks.items():
        logger.warning(
            "%d tensors are %s in place of %s, whose blocks of %d do not divide their rows",
            count,
            after.name,
            before.name,
            before.block,
        )
    return {name: types[name] for name in shapes}


def _refuse_without_importance(mixture: Mixture, types: Mapping[str, GGUFType]) -> None:
    for name, kind in types.items():
        if kind.name == mixture.base and _kind(name) not in _ENDS:
            raise InputError(
                f"{mixture.name} needs an importance matrix, without which {kind.name} matrices such as "
                f"{name} are of no use in it: give one (--imatrix or --calibration), or choose q2_k"
            )


def _kind(name: str) -> str:
    if name.removesuffix(".weight") in _ENDS:
        return name.removesuffix(".weight")
    return next((kind for part, kind in _KINDS.items() if part in name), "other")


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    # llama.cpp counts no leading dimension of 1: a matrix of one row is a vector.
    is_matrix = any(size > 1 for size in shape[:-1])
    return is_matrix and name.endswith("weight") and not any(part in name for part in _KEPT)


def _wanted(mixture: Mixture, kind: str, place: Place) -> str:
    if not mixture.is_quantized:
        return mixture.base
    rules = (*_EXPERT_RULES, *mixture.rules)
    wanted = next((rule.type for rule in rules if rule.kind == kind and rule.where(place)), mixture.base)
    if kind == "attn_v" and place.model.is_70b:
        return _VALUES_OF_70B.get(wanted, wanted)
    return wanted


def _fitting(wanted: GGUFType, K: int) -> GGUFType:
    """Return the type itself, or one whose blocks divide rows of K."""
    for kind in (wanted, gguf_type(_FALLBACKS.get(wanted.name, "f16"))):
        if K % kind.block == 0:
            return kind
    return gguf_type("f16")
