"""Names of tensors in checkpoints, for the architectures whose modules have other names in transformers.

What transformers knows of them is asked for where it is needed: `import qkern` does not import it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from qkern.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = [
    "bind_save",
    "bound_save",
    "linear_renamings",
    "own_name",
    "renames_experts",
    "save_as_stored",
    "save_pretrained",
    "stacks_experts",
    "stored_name",
]

# Last part of the name of a fused parameter, and the linears that it is made of.
_FUSED: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# Where in a model a conversion holds, which the first versions of transformers did not say.
_SCOPE: Final = ("scope_prefix", "base_model_prefix")


def stored_name(model_type: str, name: str) -> str:
    """Name in a checkpoint of what transformers calls `name`, a module, parameter or buffer."""
    return _renamed(name, _renamings(model_type, to_stored=True))


def own_name(model_type: str, stored: str) -> str:
    """Undo `stored_name`; names that are transformers' already stay."""
    return _renamed(stored, _renamings(model_type))


def stacks_experts(conversion: Any) -> bool:
    """Whether one of transformers' conversions makes fused parameters of tensors for each expert."""
    targets, sources = conversion.target_patterns, conversion.source_patterns
    parts = _FUSED.get(targets[0].rpartition(".")[2], ())
    return len(targets) == 1 and len(sources) == len(parts) and all(".*." in source for source in sources)


def linear_renamings(conversions: Iterable[Any]) -> list[Any]:
    """Return what renames stored tensors of experts to linears, where `conversions` would stack them."""
    from transformers.core_model_loading import WeightRenaming

    renamings = []
    for entry in conversions:
        if not stacks_experts(entry):
            continue
        owner, _, leaf = entry.target_patterns[0].rpartition(".")
        for source, linear in zip(entry.source_patterns, _FUSED[leaf], strict=True):
            stored = source.replace("\\.", ".").removesuffix("weight")
            own = f"{owner}.*.{linear}."
            if stored != own:
                # Unescaped, as those of transformers: its first versions would write the escapes.
                made = WeightRenaming(stored.replace("*", r"(\d+)"), own.replace("*", r"\1"))
                for name in _SCOPE:
                    if hasattr(entry, name):
                        setattr(made, name, getattr(entry, name))
                renamings.append(made)
    return renamings


def renames_experts(model: Any) -> bool:
    """Whether checkpoints of a model call linears of experts otherwise than the model does."""
    return bool(linear_renamings(_mapping(model)))


def save_as_stored(model: Any, fused: Sequence[str] = ()) -> None:
    """Let transformers' ``save_pretrained`` write linears of experts as the model's checkpoints have them.

    Parameters
    ----------
    model : nn.Module
        Without a config nothing is done: ``save_pretrained`` is of models with one.
    fused : sequence of str
        Parameters that are linears now; those that transformers does not stack on loading are stored as they
        were, and made up of the linears again.

    Raises
    ------
    UnsupportedError
        If the model may be a part of another, which would not know of it.
    """
    if getattr(model, "config", None) is None:
        return
    mapping = _mapping(model)
    own = [*linear_renamings(mapping), *_stackings(mapping, fused)]
    if not own:
        return
    # Of a loaded model those that its files needed. A prefix of files is known by nothing else.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None and getattr(model, "base_model", None) is model:
        raise UnsupportedError(
            f"{type(model).__name__} may be a part of a model, whose save_pretrained would give its experts "
            "names that no checkpoint has: got no head and no checkpoint; give the whole model, as "
            "AutoModelForCausalLM makes it"
        )
    known = {_patterns(entry) for entry in conversions or ()}
    more = [entry for entry in (*mapping, *own) if not _is_prefix(entry)]
    model._weight_conversions = [
        *(conversions or ()),
        *(entry for entry in more if _patterns(entry) not in known),
    ]
    bind_save(model, save_pretrained)


def bind_save(model: Any, save: Callable[..., None]) -> None:
    """Put a function of the model in the place of its ``save_pretrained``, in copies and pickles too."""
    # A bound method is pickled by its name, under which the class has another.
    vars(model)["save_pretrained"] = functools.partial(save, model)


def bound_save(model: Any) -> Callable[..., None] | None:
    """Return what `bind_save` put there."""
    bound = vars(model).get("save_pretrained")
    return bound.func if isinstance(bound, functools.partial) else None


def save_pretrained(self: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
    """Write a model as transformers does, its linears of experts under the names of checkpoints.

    Raises
    ------
    UnsupportedError
        If it is to write other names.
    """
    if not options.get("save_original_format", True):
        raise UnsupportedError(
            "save_original_format=False writes names of experts that no checkpoint has, since they are "
            "linears: leave it out"
        )
    type(self).save_pretrained(self, save_directory, *arguments, **options)


def _mapping(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return mapping


def _stackings(mapping: Sequence[Any], fused: Iterable[str]) -> list[Any]:
    """Conversions that, undone on saving, make stacks of linears where `mapping` has none to name them."""
    from transformers.core_model_loading import Chunk, SplitModulelist, WeightConverter

    stacked = [entry.target_patterns[0] for entry in mapping if stacks_experts(entry)]
    ends = {
        ".".join(name.split(".")[-2:])
        for name in fused
        if not any(target in f".{name}" for target in stacked)
    }
    return [
        WeightConverter(
            f".{end}",
            [f".{owner}.*.{linear}.weight" for linear in _FUSED[leaf]],
            [Chunk(dim=1), SplitModulelist(dim=0)] if len(_FUSED[leaf]) > 1 else [SplitModulelist(dim=0)],
        )
        for end in sorted(ends)
        for owner, leaf in [end.split(".")]
    ]


@functools.cache
def _renamings(model_type: str, *, to_stored: bool = False) -> tuple[Any, ...]:
    """Return what transformers renames in a mixture, its experts being linears, in this order."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_checkpoint_conversion_mapping(model_type) or []
    if not any(map(stacks_experts, mapping)):
        return ()
    theirs = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    entries = [*theirs, *linear_renamings(mapping)]
    if not to_stored:
        return tuple(entries)
    return tuple(entry.reverse_transform() for entry in reversed(entries) if not _is_prefix(entry))


def _is_prefix(entry: Any) -> bool:
    # By its name: the first versions of transformers have no such class.
    return type(entry).__name__ == "PrefixChange"


def _patterns(entry: Any) -> tuple[Any, ...]:
    return type(entry), *entry.source_patterns, *entry.target_patterns, getattr(entry, "scope_prefix", None)


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    # Some patterns are of weights: with one at its end the name of a module fits them too.
    name += ".weight"
    for entry in renamings:
        name, _ = entry.rename_source_key(name)
    return name.removesuffix(".weight")
