"""Experts as linears: transformers has all of a layer in two 3-D parameters, which nothing here replaces.

`unfuse_experts` puts modules of plain linears in their place, views of the same memory and named as
checkpoints name them; from then on a linear of an expert is a linear like any other.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from qkern.errors import FormatError, UnsupportedError
from qkern.nn.names import lies_in, places
from qkern.nn.naming import save_as_stored
from qkern.nn.shared_input import SharedInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = [
    "Expert",
    "ExpertPart",
    "Experts",
    "as_linears",
    "expert_parameters",
    "expert_parts",
    "refuse_experts",
    "unfuse_experts",
]

# Linear of an expert: the fused parameter that has it, and which of how many equal parts of the rows it is.
_FUSED: Final = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}
# Largest relative difference between two orders of the same sums in fp32.
_ROUNDING: Final = 1e-4


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """A matrix inside a fused parameter.

    Parameters
    ----------
    parameter : str
        Name of the parameter ``[E, rows, K]``.
    expert, experts : int
        Which of how many matrices of it.
    part, parts : int
        Which of how many equal parts of the matrix's rows.
    """

    parameter: str
    expert: int
    experts: int
    part: int
    parts: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of the parameter's value, a view.

        Raises
        ------
        FormatError
            If the value is no stack of so many matrices with so many parts.
        """
        if tensor.dim() != 3 or len(tensor) != self.experts or tensor.shape[1] % self.parts:
            raise FormatError(
                f"tensor {self.parameter} must be [{self.experts}, rows, columns], the rows in {self.parts} "
                f"equal parts: got {list(tensor.shape)}; config and weights belong to different models"
            )
        return tensor[self.expert].chunk(self.parts)[self.part]

    def __str__(self) -> str:
        return f"{self.parameter}[{self.expert}]"


class Expert(nn.Module):
    """One expert: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

    Parameters
    ----------
    weights : mapping
        Weight ``[N, K]`` of each of the three linears, which becomes its parameter without a copy.
    act_fn : callable
        The activation, elementwise.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, weights: Mapping[str, nn.Parameter], act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            N, K = weight.shape
            linear = nn.Linear(K, N, bias=False, device="meta")
            linear.weight = weight
            setattr(self, name, linear)
        self.act_fn = act_fn
        self._shared_input = SharedInput()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the expert of tokens ``[T, H]``."""
        outs = self._shared_input((self.gate_proj, self.up_proj), x)
        gate, up = (self.gate_proj(x), self.up_proj(x)) if outs is None else outs
        result: Tensor = self.down_proj(self.act_fn(gate) * up)
        return result


class Experts(nn.ModuleList):
    """The experts of a layer, each run on the tokens that were routed to it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of what a token's experts make of it.

        Parameters
        ----------
        hidden_states : Tensor
            ``[T, H]``.
        top_k_index : Tensor
            int64 ``[T, k]``: the experts of each token; a number past the last one is none.
        top_k_weights : Tensor
            ``[T, k]``: their weights.

        Returns
        -------
        Tensor
            ``[T, H]`` in the dtype of `hidden_states`.
        """
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            if number < len(self):
                token, choice = torch.where(top_k_index == number)
                out = self[number](hidden_states[token]) * top_k_weights[token, choice, None]
                result.index_add_(0, token, out.to(result.dtype))
        return result


def unfuse_experts(model: nn.Module, *, skip: Sequence[str] = ()) -> list[str]:
    """Replace modules that hold experts as 3-D parameters by modules with a linear for each matrix, in place.

    Such a module is known by its parameters, ``gate_up_proj`` ``[E, 2 I, H]`` and ``down_proj``
    ``[E, H, I]``, and by what its forward makes of small ones. Others stay: `expert_parameters` names them.

    Parameters
    ----------
    model : nn.Module
        Any model. The weights of the linears are views of the parameters (on the meta device too), so this
        takes no memory; outputs stay the same up to rounding. ``save_pretrained`` of a whole model writes
        what it did; it knows nothing of a decoder layer that was given by itself.
    skip : sequence of str
        Modules to leave as they are, by their name or that of a module around them, as in `name_matches`.

    Returns
    -------
    list of str
        Names of the modules that were replaced.

    Raises
    ------
    UnsupportedError
        If the model has no head and is of no checkpoint, and checkpoints have other names: it may be a part
        of a model, whose ``save_pretrained`` would not know them.
    """
    where = places(model)
    found = {name: model.get_submodule(name) for name, _ in _fused_modules(model) if not lies_in(name, skip)}
    replaced = {name: fused for name, fused in found.items() if id(fused) in where and not _why_fused(fused)}
    if replaced:
        save_as_stored(
            model, [f"{name}.{leaf}" for name in replaced for leaf in ("gate_up_proj", "down_proj")]
        )
    for fused in replaced.values():
        made = _unfused(fused)
        for parent, attribute in where[id(fused)]:
            setattr(parent, attribute, made)
    return list(replaced)


def expert_parts(model: nn.Module) -> dict[str, dict[str, ExpertPart]]:
    """Where the weights of a model's experts lie when they are fused, whether this model has them so or not.

    Returns
    -------
    dict of str to dict
        Name of a fused parameter to its parts, by the names that the weights of the linears have.
    """
    found: dict[str, dict[str, ExpertPart]] = {}
    owners = {name: len(module) for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, _ in _fused_modules(model):
        module: Any = model.get_submodule(name)
        if _why_fused(module) is None:
            owners[name] = len(module.down_proj)
    for owner, count in owners.items():
        for number in range(count):
            for linear, (leaf, part, parts) in _FUSED.items():
                parameter = f"{owner}.{leaf}"
                place = ExpertPart(parameter, number, count, part, parts)
                found.setdefault(parameter, {})[f"{owner}.{number}.{linear}.weight"] = place
    return found


def as_linears(name: str, tensor: Tensor, parts: Mapping[str, Mapping[str, ExpertPart]]) -> dict[str, Tensor]:
    """Return a tensor by its name, or if it is a fused parameter (see `expert_parts`) its parts by theirs."""
    places = parts.get(name)
    return {name: tensor} if places is None else {own: part.of(tensor) for own, part in places.items()}


def expert_parameters(model: nn.Module, *, skip: Sequence[str] = ()) -> list[str]:
    """Names of weights that are stacks of matrices ``[E, N, K]``, as mixtures of experts store them.

    Parameters
    ----------
    model : nn.Module
        Any model.
    skip : sequence of str
        Names of parameters, of the modules that own them, or of modules around these to leave out, as in
        `name_matches`.
    """
    return [
        full
        for owner, names in _fused_modules(model)
        for full in (f"{owner}.{name}" if owner else name for name in names)
        if not lies_in(full, skip)
    ]


def refuse_experts(model: nn.Module, *, skip: Sequence[str] = ()) -> None:
    """Refuse the experts that `unfuse_experts` does not know and `skip` does not leave out.

    Raises
    ------
    UnsupportedError
        Naming the parameters, why each module is not unfused, and what to skip.
    """
    reasons = {owner: _why_fused(model.get_submodule(owner)) for owner, _ in _fused_modules(model)}
    left = [name for name in expert_parameters(model, skip=skip) if reasons[name.rpartition(".")[0]]]
    if not left:
        return
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in left))
    shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    raise UnsupportedError(
        f"{len(left)} 3-D parameters, which look like stacks of experts, cannot be quantized: {shown}; "
        f"{owners[0] or 'the model'} {reasons[owners[0]]}; leave them 16-bit with "
        f"skip={sorted({owner.rpartition('.')[2] for owner in owners})!r} (--skip)"
    )


def _fused_modules(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Modules that own stacks of matrices, and the names of these in them."""
    for owner, module in model.named_modules():
        # Convolutions of torch have three dimensions too, and are no experts.
        if type(module).__module__.startswith("torch.nn."):
            continue
        names = [
            name
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and parameter.is_floating_point()
        ]
        if names:
            yield owner, names


def _why_fused(module: nn.Module) -> str | None:
    """Why a module with stacks of matrices cannot become `Experts`; None if it can."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return f"has {', '.join(parameters)}: known are gate_up_proj, down_proj and an act_fn, no biases"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if down.dim() != 3 or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return (
            f"has gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}, not [E, 2 I, H] and "
            "[E, H, I]"
        )
    if not _is_plain(module):
        return "computes something else than the weighted sum of down(act(gate) * up)"
    return None


@torch.no_grad()
def _is_plain(module: Any) -> bool:
    """Whether a module computes what `Experts` does: both are run on a few tokens with small matrices."""
    count, H, inner = min(len(module.down_proj), 3), 3, 5
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Far from zero too: some architectures clamp what goes into the product.
        return 4 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    probe = copy.copy(module)
    probe._parameters = {
        "gate_up_proj": nn.Parameter(random(count, 2 * inner, H)),
        "down_proj": nn.Parameter(random(count, H, inner)),
    }
    chosen = torch.tensor([[0, count - 1], [count - 1, 0], [count // 2, 0]], device="cpu")
    given = random(3, H), chosen, random(3, 2)
    try:
        # Below transformers' choice of implementation, which may lead to a kernel of a GPU.
        found = inspect.unwrap(type(module).forward)(probe, *given)
        wanted = _unfused(probe)(*given)
    except Exception:  # a forward or an activation that is not called so is of something else
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == wanted.shape
        and bool((found - wanted).norm() <= _ROUNDING * wanted.norm())
    )


def _unfused(module: Any) -> Experts:
    """`Experts` on the memory of a module's fused parameters."""
    count = len(module.down_proj)

    def weight(number: int, parameter: str, part: int, parts: int) -> nn.Parameter:
        fused = getattr(module, parameter)
        view = ExpertPart(parameter, number, count, part, parts).of(fused.detach())
        return nn.Parameter(view, requires_grad=fused.requires_grad)

    return Experts(
        Expert({linear: weight(number, *place) for linear, place in _FUSED.items()}, module.act_fn)
        for number in range(count)
    ).train(module.training)
