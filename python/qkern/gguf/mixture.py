"""Which tensor gets which type: llama.cpp's mixtures, by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qkern.errors import UnsupportedError
from qkern.ops.gguf_types import GGUFType, gguf_type

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALIASES", "MIXTURES", "Mixture", "Rule", "choose_type", "mixture_for"]


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is one of the sensitive ones: the first and last eighth, and each third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of a kind that get another type than the base in some layers.

    Parameters
    ----------
    tensor : str
        Kind of tensor, such as ``"attn_v"``.
    type : str
        The type they get.
    where : callable
        From layer and number of layers to whether the rule holds.
    """

    tensor: str
    type: str
    where: Callable[[int, int], bool]


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
    """

    name: str
    base: str
    file_type: int
    rules: tuple[Rule, ...] = ()

    @property
    def output(self) -> str:
        """Type of the output matrix, or of the embedding where the two are tied."""
        if self.base in ("f32", "f16", "bf16", "q8_0"):
            return self.base
        return "q6_k"


_ALL: Final = (
    Mixture(name="f32", base="f32", file_type=0),
    Mixture(name="f16", base="f16", file_type=1),
    Mixture(name="q4_0", base="q4_0", file_type=2),
    Mixture(name="q4_1", base="q4_1", file_type=3),
    Mixture(name="q8_0", base="q8_0", file_type=7),
    Mixture(name="q5_0", base="q5_0", file_type=8),
    Mixture(name="q5_1", base="q5_1", file_type=9),
    Mixture(
        name="q4_k_m",
        base="q4_k",
        file_type=15,
        rules=(Rule("attn_v", "q6_k", _more_bits), Rule("ffn_down", "q6_k", _more_bits)),
    ),
    Mixture(name="q6_k", base="q6_k", file_type=18),
    Mixture(name="bf16", base="bf16", file_type=32),
)
MIXTURES: Final[dict[str, Mixture]] = {mixture.name: mixture for mixture in _ALL}
ALIASES: Final = {"q4_k": "q4_k_m"}

# Types with large blocks, and what a row gets that they do not divide.
_FALLBACKS: Final = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}

# Small, or added where llama.cpp wants fp32: norms, routers, positions.
_KEPT: Final = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")


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


def choose_type(
    mixture: Mixture,
    name: str,
    shape: tuple[int, ...],
    *,
    layers: int,
    tied: bool,
    is_70b: bool = False,
    pure: bool = False,
) -> GGUFType:
    """Type of a tensor in a file.

    Parameters
    ----------
    mixture : Mixture
        The mixture of the file.
    name : str
        llama.cpp's name of the tensor, such as ``blk.0.attn_v.weight``.
    shape : tuple of int
        As torch has it.
    layers : int
        Layers of the model.
    tied : bool
        Whether the embedding is the output matrix too.
    is_70b : bool
        A model of 80 layers with grouped queries, where eight query heads share each value head.
    pure : bool
        The base type for every matrix.

    Returns
    -------
    GGUFType
        f32 for vectors and norms; else a type whose block divides the rows.
    """
    if len(shape) < 2 or name.endswith(_KEPT) or not name.endswith(".weight"):
        return gguf_type("f32")
    wanted = mixture.base if pure else _wanted(mixture, name, layers=layers, tied=tied, is_70b=is_70b)
    K = shape[-1]
    if K % gguf_type(wanted).block:
        wanted = _FALLBACKS.get(wanted, wanted)
    if K % gguf_type(wanted).block:
        wanted = "f16"
    return gguf_type(wanted)


def _wanted(mixture: Mixture, name: str, *, layers: int, tied: bool, is_70b: bool) -> str:
    parts = name.split(".")
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mixture.output
    if parts[0] != "blk":
        return mixture.base
    layer, kind = int(parts[1]), parts[2]
    wanted = mixture.base
    for rule in mixture.rules:
        if rule.tensor == kind and rule.where(layer, layers):
            wanted = rule.type
    if kind == "attn_v" and is_70b and wanted == "q4_k":
        # The value matrix is small there, and eight heads depend on it.
        return "q5_k"
    return wanted
