"""Names of tensors in checkpoints, for the architectures whose modules have other names in transformers."""

from __future__ import annotations

import functools
import re
from typing import Any, Final

__all__ = ["own_name", "renames", "save_as_stored", "stored_name", "weight_renamings"]

_MIXTRAL: Final = (
    (".mlp.", ".block_sparse_moe."),
    (".experts.#.gate_proj.", ".experts.#.w1."),
    (".experts.#.down_proj.", ".experts.#.w2."),
    (".experts.#.up_proj.", ".experts.#.w3."),
)
# Parts of names in transformers, experts being linears, and what checkpoints have there; # is a number.
_STORED: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "ernie4_5_moe": ((".mlp.gate.moe_statics.", ".mlp.moe_statics."),),
    "exaone_moe": ((".mlp.gate.e_score_correction_bias.", ".mlp.e_score_correction_bias."),),
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "phimoe": ((".mlp.router.", ".mlp.gate."), *_MIXTRAL),
}


@functools.cache
def renames(model_type: str, *, to_stored: bool = False) -> tuple[tuple[str, str], ...]:
    """Regular expressions and replacements that make a name of transformers' of one in a checkpoint.

    Parameters
    ----------
    model_type : str
        ``config.model_type``; of most architectures both have the same names.
    to_stored : bool
        The other way round.

    Returns
    -------
    tuple of (str, str)
        To be applied in this order, to a name with a dot behind it.
    """
    pairs = _STORED.get(model_type, ())
    if not to_stored:
        pairs = tuple((stored, own) for own, stored in reversed(pairs))
    return tuple((re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1")) for old, new in pairs)


def stored_name(model_type: str, name: str) -> str:
    """Name in a checkpoint of what transformers calls `name`, a module, parameter or buffer."""
    return _renamed(name, renames(model_type, to_stored=True))


def own_name(model_type: str, stored: str) -> str:
    """Undo `stored_name`; names that are transformers' already stay."""
    return _renamed(stored, renames(model_type))


def weight_renamings(model_type: str) -> list[Any]:
    """Return `renames` as transformers applies them on loading and undoes them on saving."""
    pairs = renames(model_type)
    if not pairs:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(*pair) for pair in pairs]


def save_as_stored(model: Any) -> None:
    """Let transformers' ``save_pretrained`` write linears of experts under the names that checkpoints have.

    Parameters
    ----------
    model : nn.Module
        Without a config nothing is done: ``save_pretrained`` is of models with one.
    """
    own = weight_renamings(str(getattr(getattr(model, "config", None), "model_type", "")))
    if not own:
        return
    theirs = getattr(model, "_weight_conversions", None)
    if theirs is None:  # the model is of no checkpoint
        from transformers.conversion_mapping import get_model_conversion_mapping

        theirs = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [*theirs, *own]


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    name += "."
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")
