"""What each runtime can load: the alleles, what must be stored alike, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from qkern.checkpoints import format_named
from qkern.errors import InputError, UnsupportedError
from qkern.models import column_weight, is_router
from qkern.nn import named_linears, role
from qkern.ops.gguf_types import GGUFType
from qkern.schemes import Scheme
from qkern.search.assignment import KEPT, parse_choice, spell_choice
from qkern.search.space import EMBEDDING, Gene, Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qkern.models import Structure

__all__ = ["RUNTIMES", "Runtime", "make_space", "runtime_named", "stored_bits", "tied_linears"]

# vLLM's kernels for packed weights take whole tiles of these sizes.
_TILE: Final = (64, 128)
# Of GPTQ checkpoints vLLM runs symmetric ones of these bits and group sizes alone.
_VLLM_GPTQ: Final = ((4, 8), (None, 32, 64, 128))
_SMALLEST_GROUP: Final = 16
# Where a row has no whole super-blocks of 256.
_SMALL_TYPES: Final = ("q4_0", "q5_0", "q8_0", KEPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A target of a search.

    Parameters
    ----------
    name : str
        Name on the command line.
    alleles : tuple of str
        What is tried by default.
    is_fused : bool
        Linears that the runtime fuses (q, k, v; gate, up) share a choice.
    """

    name: str
    alleles: tuple[str, ...]
    is_fused: bool = False

    def refusal(self, spelling: str, N: int, K: int, *, format: str = "compressed-tensors") -> str | None:
        """Why the runtime cannot load a matrix ``[N, K]`` stored so; None if it can.

        Schemes are those of a checkpoint in `format`.
        """
        choice = parse_choice(spelling)
        if choice is None:
            return None
        if isinstance(choice, GGUFType) != (self.name == "gguf"):
            wanted = "GGUF types such as q4_k" if self.name == "gguf" else "schemes such as w4g128"
            return f"runtime {self.name} takes {wanted}: got {spelling}"
        if isinstance(choice, GGUFType):
            if K % choice.block:
                return f"blocks of {choice.block} do not divide rows of {K}"
            return None
        if self.name == "vllm":
            bits, sizes = _VLLM_GPTQ
            if format.startswith("gptq") and (
                choice.zero_point or choice.bits not in bits or choice.group_size not in sizes
            ):
                return (
                    f"vLLM takes GPTQ with 4 and 8 bits, symmetric, in groups of 32, 64 or 128 or channels "
                    f"alone: got {spelling}; use compressed-tensors"
                )
            if choice.zero_point and choice.bits not in (4, 8):
                return f"vLLM takes zero points with 4 and 8 bits alone: got {spelling}"
            if choice.act_bits is not None and (choice.zero_point or not choice.has_plain_sums):
                return (
                    f"vLLM takes int8 activations with symmetric 8-bit channels alone, w8a8: got {spelling}"
                )
            if N % _TILE[0] or K % _TILE[1]:
                return (
                    f"vLLM's kernels take multiples of {_TILE[0]} rows and {_TILE[1]} columns: got {N} x {K}"
                )
        return format_named(format).holds(choice, N, K)


RUNTIMES: Final = {
    runtime.name: runtime
    for runtime in (
        Runtime(name="torch", alleles=("w2g128", "w2g64", "w3g128", "w4g128", "w8")),
        Runtime(name="vllm", alleles=("w2g128", "w2g64", "w3g128", "w4g128", "w8"), is_fused=True),
        Runtime(name="gguf", alleles=("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")),
    )
}


def runtime_named(name: str) -> Runtime:
    """Return a runtime.

    Raises
    ------
    InputError
        On another name.
    """
    if name not in RUNTIMES:
        raise InputError(f"unknown runtime {name!r}: allowed are {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def stored_bits(
    spelling: str, *shapes: tuple[int, int], kept: int | None = None, in_file: bool = False
) -> int:
    """Bits of the matrices of a gene, which are one tensor in a GGUF.

    Parameters
    ----------
    spelling : str
        See `parse_choice`.
    *shapes : tuple of int
        Rows and columns of each.
    kept : int, optional
        Bits of all of them if they stay as they are; default: 16 a weight.
    in_file : bool
        Of their tensors in a compressed-tensors checkpoint (rows padded to words, and the stored shape), or
        in a GGUF (tensors padded to 32 bytes), instead of codes, scales and zero points alone.
    """
    choice = parse_choice(spelling)
    if choice is None:
        return 16 * sum(N * K for N, K in shapes) if kept is None else kept
    if isinstance(choice, GGUFType):
        size = sum(N * choice.row_bytes(K) for N, K in shapes)
        return 8 * (-(-size // 32) * 32 if in_file else size)
    if in_file:
        stored_bytes = format_named("compressed-tensors").stored_bytes
        return 8 * sum(stored_bytes(choice, N, K) for N, K in shapes)
    return sum(_coded_bits(choice, N, K) for N, K in shapes)


def _coded_bits(scheme: Scheme, N: int, K: int) -> int:
    rows, groups = scheme.scale_shape(N, K)
    scales = 8 * scheme.scale_bytes(rows * groups)
    return N * K * scheme.bits + scales + scheme.bits * rows * groups * scheme.zero_point


def make_space(
    model: Any,
    structure: Structure,
    runtime: Runtime,
    alleles: Sequence[str] | None = None,
    *,
    stored: Mapping[str, int] | None = None,
    head: bool = False,
    embedding: bool = False,
    in_file: bool = False,
) -> tuple[Space, dict[str, str]]:
    """Genes of a model for a runtime, and the linears that stay as they are with the reason.

    Parameters
    ----------
    model : PreTrainedModel
        May have no weights.
    structure : Structure
        `qkern.models.describe` of it.
    runtime : Runtime
        What will load the result.
    alleles : sequence of str, optional
        Spellings to try; default: the runtime's, with smaller groups (for GGUF blocks) where rows have no
        whole ones. Of each gene those are left that all of it can have.
    stored : mapping, optional
        Bytes of weights as they are stored now; default: as `model` holds them.
    head : bool
        Search the output head too.
    embedding : bool
        Search the input embedding too, which GGUF alone holds quantized; a tied head is part of it.
    in_file : bool
        See `stored_bits`.

    Raises
    ------
    InputError
        If no linear is left, or an allele is not understood.
    UnsupportedError
        If no linear at all can have some allele, on a tied head, or on an embedding for another runtime.
    """
    named = runtime.alleles if alleles is None else alleles
    tried = tuple(dict.fromkeys(spell_choice(parse_choice(allele)) for allele in named))
    if not tried:
        raise InputError("there is nothing to choose: got no alleles; name some, or leave them out")
    if set(tried) == {KEPT}:
        raise InputError(f"there is nothing to choose: got {KEPT} alone; add schemes or GGUF types")
    if head and structure.tied:
        with_it = "; a search of the embedding (--embedding) has both" if runtime.name == "gguf" else ""
        raise UnsupportedError(
            f"{structure.head} is tied to the input embedding: leave it (--head) out of the search{with_it}"
        )
    linears = {name: column_weight(linear) for name, linear in named_linears(model).items()}
    kept: dict[str, str] = {}
    groups = tied_linears(linears, structure, runtime, head=head, kept=kept)
    if embedding:
        groups.insert(0, (EMBEDDING, (_add_embedding(model, runtime, linears),)))
        if structure.tied:
            kept.pop(str(structure.head), None)
    now = {**{name: weight.nbytes for name, weight in linears.items()}, **(stored or {})}
    genes = []
    usable: set[str] = set()
    reasons: dict[str, str] = {}
    for layer, names in groups:
        shapes = {name: (linears[name].shape[0], linears[name].shape[1]) for name in names}
        sizes: dict[str, int] = {}
        refused: list[str] = []
        for spelling in tried if alleles is not None else _fitting(runtime, shapes.values()):
            refusals = ((name, runtime.refusal(spelling, *shape)) for name, shape in shapes.items())
            first = next((f"{name}: {why}" for name, why in refusals if why), None)
            if first is not None:
                refused.append(first)
                reasons.setdefault(spelling, first)
                continue
            sizes[spelling] = stored_bits(
                spelling,
                *shapes.values(),
                kept=8 * sum(now[name] for name in names),
                in_file=in_file,
            )
        if set(sizes) <= {KEPT}:
            usable |= set(sizes)
            kept |= dict.fromkeys(names, refused[0])
            continue
        # Of two alike in size the first named stays.
        by_size = {size: spelling for spelling, size in reversed(sizes.items())}
        ordered = sorted(by_size.items())
        usable |= set(by_size.values())
        for spelling in sizes.keys() - usable:
            reasons.setdefault(spelling, f"it takes as many bits as {by_size[sizes[spelling]]}")
        genes.append(
            Gene(
                names=names,
                layer=layer,
                weights=sum(linears[name].numel() for name in names),
                alleles=tuple(spelling for _, spelling in ordered),
                bits=tuple(size for size, _ in ordered),
            )
        )
    unusable = [spelling for spelling in tried if spelling not in usable] if alleles is not None else []
    if unusable and reasons:
        raise UnsupportedError(
            f"no linear can have {unusable[0]} in runtime {runtime.name}: {reasons[unusable[0]]}; leave it "
            "out"
        )
    if not genes and reasons:
        spelling, reason = next(iter(reasons.items()))
        raise UnsupportedError(
            f"no linear can be quantized for runtime {runtime.name}, as {spelling}: {reason}; choose another "
            "runtime, or name choices (--alleles)"
        )
    return Space(tuple(genes)), kept


def _fitting(runtime: Runtime, shapes: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """Default alleles for matrices of these shapes."""
    if runtime.name == "gguf":
        return (*runtime.alleles, *_SMALL_TYPES)
    common = math.gcd(*(K for _, K in shapes))
    found = []
    for spelling in runtime.alleles:
        scheme = Scheme.parse(spelling)
        size = scheme.group_size
        while size is not None and common % size and size > _SMALLEST_GROUP:
            size //= 2
        found.append(str(replace(scheme, group_size=size)))
    return tuple(dict.fromkeys(found))


def _add_embedding(model: Any, runtime: Runtime, matrices: dict[str, Any]) -> str:
    """Take the input embedding in among matrices; return its name."""
    if runtime.name != "gguf":
        raise UnsupportedError(
            f"no checkpoint format holds quantized embeddings: got runtime {runtime.name}; leave the "
            "embedding out of the search, or choose runtime gguf"
        )
    table = model.get_input_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is table)
    matrices[name] = table.weight.detach()
    return name


def tied_linears(
    linears: Iterable[str], structure: Structure, runtime: Runtime, *, head: bool, kept: dict[str, str]
) -> list[tuple[int, tuple[str, ...]]]:
    """Layer and names of the linears that share a choice; what has none goes into `kept`.

    Experts of a layer that do the same share one; in a runtime that fuses all linears of theirs.
    """
    inside = f"{structure.layers}."
    fused = structure.architecture.fused if runtime.is_fused and structure.architecture is not None else ()
    found: dict[tuple[int, str], list[str]] = {}
    for name in linears:
        if name == structure.head:
            if head:
                found[structure.count, name] = [name]
            else:
                kept[name] = "output head"
        elif not name.startswith(inside):
            kept[name] = "outside the decoder layers"
        elif is_router(name):
            kept[name] = "router"
        else:
            index, _, rest = name.removeprefix(inside).partition(".")
            alike = role(rest).partition(".#")[0] if runtime.is_fused else role(rest)
            group = next((group[0] for group in fused if rest in group), alike)
            found.setdefault((int(index), group), []).append(name)
    return [(layer, tuple(names)) for (layer, _), names in sorted(found.items(), key=lambda item: item[0][0])]
