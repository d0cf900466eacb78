"""Which tensors of a checkpoint make one of a GGUF: one, one an expert, or a part of a fused parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qkern.errors import FormatError, InputError
from qkern.gguf.quantized import same_grid, stacked
from qkern.ops import dequantize_groupwise
from qkern.pipelines.history import with_grid
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qkern.checkpoints import QuantizedCheckpoint
    from qkern.gguf import GGUFArchitecture
    from qkern.ops.gguf_types import GGUFType

__all__ = ["Source", "find_sources", "stored_names"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of a tensor lie.

    Parameters
    ----------
    stored : tuple of str
        Names in the checkpoint; several are stacked, one an expert.
    part, parts : int
        Which of how many equal parts of the rows.
    """

    stored: tuple[str, ...]
    part: int = 0
    parts: int = 1

    def is_quantized(self, checkpoint: QuantizedCheckpoint) -> bool:
        """Whether all of it is quantized in the checkpoint."""
        return all(name in checkpoint.entries for name in self.stored)

    def keeps_codes(self, checkpoint: QuantizedCheckpoint, kind: GGUFType) -> bool:
        """Whether all of it is quantized on the grid of the type: more bits would not serve it."""
        entries = checkpoint.entries
        return self.is_quantized(checkpoint) and all(
            same_grid(kind, entries[name].scheme) and not entries[name].act_order for name in self.stored
        )

    def keeps(self, checkpoint: QuantizedCheckpoint, kind: GGUFType) -> bool:
        """Whether nothing is rounded to codes in this type, scales and offsets aside."""
        return kind.block == 1 or self.keeps_codes(checkpoint, kind)

    def grids(
        self, checkpoint: QuantizedCheckpoint, kind: GGUFType, recorded: Mapping[str, list[str]]
    ) -> list[str]:
        """`with_grid` of what is stored in this type; of experts in several that of the one rounded most."""

        def fineness(name: str) -> tuple[float, float]:
            scheme = checkpoint.entries[name].scheme
            return scheme.bits, -(scheme.group_size or math.inf)

        quantized = self.is_quantized(checkpoint)
        name = min(self.stored, key=fineness) if quantized else self.stored[0]
        own = [str(checkpoint.entries[name].scheme)] if quantized else []
        before = recorded.get(name.removesuffix(".weight"), own)
        return with_grid(before, kind.name, is_exact=self.keeps(checkpoint, kind)) if before else []

    def check_shape(self, checkpoint: QuantizedCheckpoint, shape: tuple[int, ...]) -> None:
        """Refuse tensors that do not make one of this shape, or are no floats, by the headers of their files.

        What is quantized is left out: its shape is known when it is decoded.

        Raises
        ------
        InputError
            Naming the tensor.
        """
        expected = shape[1:] if len(self.stored) > 1 else shape
        if self.parts > 1:
            expected = (*expected[:-2], self.parts * expected[-2], expected[-1])
        for name in self.stored:
            if name not in checkpoint.entries:
                dtype = checkpoint.tensors.header(name).dtype
                if not dtype.is_floating_point:
                    raise InputError(
                        f"{name} is {dtype}: weights must be floats; use the model's 16-bit files"
                    )
                found = checkpoint.tensors.shape(name)
                if _without_ones(found) != _without_ones(expected):
                    raise InputError(
                        f"{name} must be {expected}: got {found}; config and weights belong to different "
                        "models"
                    )

    def read(self, checkpoint: QuantizedCheckpoint) -> Tensor | QuantizedWeight:
        """Read the values; no more than two copies of them at a time.

        Quantized ones stay so, unless experts differ in form or only a part is wanted.

        Raises
        ------
        InputError
            If experts differ in shape.
        """
        if self.parts == 1 and self.is_quantized(checkpoint):
            weight = stacked([checkpoint.weight(name) for name in self.stored])
            if weight is not None:
                return weight
        if len(self.stored) == 1:
            tensor = _decoded(checkpoint, self.stored[0])
            return tensor if self.parts == 1 else tensor.chunk(self.parts, dim=-2)[self.part]
        first = _decoded(checkpoint, self.stored[0])
        stack = torch.empty(len(self.stored), *first.shape, dtype=first.dtype, device="cpu")
        for expert, name in enumerate(self.stored):
            value = _decoded(checkpoint, name)
            if value.shape != first.shape:
                raise InputError(f"{name} must be {tuple(first.shape)}: got {tuple(value.shape)}")
            stack[expert] = value
        return stack


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leave leading dimensions of 1 out, in which a matrix of one row and a vector differ."""
    ones = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return shape[ones:]


def _decoded(checkpoint: QuantizedCheckpoint, name: str) -> Tensor:
    value = checkpoint[name]
    return dequantize_groupwise(value) if isinstance(value, QuantizedWeight) else value


def stored_names(checkpoint: QuantizedCheckpoint, architecture: GGUFArchitecture) -> dict[str, str]:
    """Map transformers' tensor names to names in the checkpoint; what no file holds is left out."""
    names = {}
    for stored in checkpoint:
        name = architecture.own_name(f"{stored}.weight" if stored in checkpoint.entries else stored)
        if name is not None:
            names[name] = stored
    return names


def find_sources(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    *,
    unused: frozenset[str] = frozenset(),
) -> dict[str, Source]:
    """Find what each tensor of ``architecture.shapes`` is made of.

    Parameters
    ----------
    checkpoint : QuantizedCheckpoint
        Named in messages.
    architecture : GGUFArchitecture
        Knows the names.
    shapes : mapping
        The tensors, with their shapes.
    stored : mapping
        `stored_names`.
    unused : frozenset of str
        Tensors that may be there and are not written.

    Raises
    ------
    FormatError
        If tensors are missing or left over.
    """
    sources, missing, used = {}, [], set(unused)
    for name, shape in shapes.items():
        fused = architecture.fused_name(name)
        if fused is not None and fused in stored:
            place = architecture.weight_of(name).fused
            assert place is not None
            sources[name] = Source((stored[fused],), place.part, place.parts)
            used.add(fused)
            continue
        pieces = architecture.pieces(name, shape[0])
        used.update(pieces)
        absent = [piece for piece in pieces if piece not in stored]
        missing += absent
        if not absent:
            sources[name] = Source(tuple(stored[piece] for piece in pieces))
    left_over = [name for name in stored if name not in used]
    if missing or left_over:
        raise FormatError(
            f"{checkpoint.folder} does not fit its config.json: missing are {missing[:8]}, "
            f"left over are {left_over[:8]}; fetch it again"
        )
    return sources
