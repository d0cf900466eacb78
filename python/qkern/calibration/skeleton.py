"""A model that holds no weights, and the weights that fill it one module at a time."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qkern.errors import FormatError, InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from qkern.nn import ExpertPart

__all__ = ["Weights", "bind_names", "fill", "filled", "load_config", "meta_copy", "meta_model"]


class Weights:
    """The tensors of a model by their name in the model, in the dtype they are stored in.

    Parameters
    ----------
    tensors : mapping
        Stored name to tensor; may read from disk.
    names : mapping
        Name in the model to stored name, or to the part of a stored stack of experts, of every parameter
        and buffer that is stored.
    where : str
        What holds the tensors, for messages.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str | ExpertPart], where: str
    ) -> None:
        self.tensors = tensors
        self.names = dict(names)
        self.where = where

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def get(self, name: str) -> Tensor:
        """Return one tensor on the CPU.

        Raises
        ------
        InputError
            If it holds NaN or Inf.
        FormatError
            If the stack that it is a part of has another shape.
        """
        stored = self.names[name]
        if isinstance(stored, str):
            tensor = self.tensors[stored].detach().cpu()
        else:
            tensor = stored.of(self.tensors[stored.parameter]).detach().cpu()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"tensor {stored} of {self.where} has NaN or Inf values: "
                "qkern quantizes finite weights only; repair the tensor"
            )
        return tensor

    def stored(self) -> set[str]:
        """Names of all stored tensors that the model takes."""
        return {name if isinstance(name, str) else name.parameter for name in self.names.values()}


def bind_names(model: Any, stored: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Match the names of a model's tensors with those of its files.

    Files of a bare decoder leave the base prefix out (``h.0...`` for ``transformer.h.0...``), and of two
    tied tensors files may hold either.

    Returns
    -------
    names : dict
        Name in the model to stored name.
    missing : list of str
        Names in the model for which nothing is stored.
    """
    prefix = f"{model.base_model_prefix}."
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    state = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in state:
            groups.setdefault(id(buffer), []).append(name)
    names: dict[str, str] = {}
    missing: list[str] = []
    for tied in groups.values():
        spellings = ((name, name.removeprefix(prefix), prefix + name) for name in tied)
        options = [option for option in chain.from_iterable(spellings) if option in stored]
        names.update(dict.fromkeys(tied, options[0]) if options else {})
        missing.extend(() if options else tied[:1])
    return names, missing


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let every parameter that is registered in the block live on the meta device; buffers stay real.

    `torch.device("meta")` would make the buffers meta too, and rotary frequencies are in no file.
    """
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_config(folder: Path) -> Any:
    """Read the configuration of a model folder, defaults filled in; no code of the folder runs.

    Raises
    ------
    FormatError
        If transformers does not read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its validators raise errors of several libraries
        file = folder / "config.json"
        raise FormatError(f"{file} is no configuration that transformers reads: {error}") from error


def meta_model(config: Any) -> Any:
    """Build a causal LM whose parameters hold no memory and whose buffers are real, in evaluation mode.

    Raises
    ------
    InputError
        If transformers has no causal LM for the config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("cpu"), _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except ValueError as error:
        raise InputError(
            f"{config.model_type} is not a causal LM that transformers can build: {error}"
        ) from error
    except Exception as error:  # architectures divide, index and multiply by what the config says
        raise InputError(
            f"transformers cannot build a causal LM from this {config.model_type} config "
            f"({type(error).__name__}: {error}); use the config.json that belongs to the weights"
        ) from error
    model.tie_weights()
    return model.eval()


def meta_copy(model: Any) -> Any:
    """Copy a model in memory without its parameters: the same modules, buffers and ties."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


def fill(
    module: nn.Module,
    weights: Weights,
    *,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    skip: Collection[str] = (),
    copied: bool = False,
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give every meta parameter (and stored buffer) of `module` its value.

    Parameters
    ----------
    module : nn.Module
        Whole model or a part of it.
    weights : Weights
        The values.
    prefix : str
        Name of `module` in the model with a dot behind it, empty for the model itself.
    dtype : torch.dtype, optional
        Dtype of floating-point values; default: as stored.
    device : torch.device or str
        Where they go.
    skip : collection of str
        Names (in the model) of child modules that stay as they are.
    copied : bool
        Share no memory with `weights`, which may be views of a file.

    Returns
    -------
    list
        What was replaced: module, name and meta parameter.

    Raises
    ------
    FormatError
        If a stored shape differs from the model's.
    InputError
        If a value is NaN or Inf.
    """
    done: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, owner in module.named_modules():
            base = f"{prefix}{path}." if path else prefix
            if any(base.startswith(f"{name}.") for name in skip):
                continue
            for leaf, old in list(owner._parameters.items()):
                if old is None or not old.is_meta:
                    continue
                if id(old) not in done:
                    value = _value(weights, base + leaf, old.shape, dtype, device, copied)
                    done[id(old)] = nn.Parameter(value, requires_grad=False)
                owner._parameters[leaf] = done[id(old)]
                replaced.append((owner, leaf, old))
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    value = buffer.to(device)
                    if base + leaf in weights and leaf not in owner._non_persistent_buffers_set:
                        value = _value(weights, base + leaf, buffer.shape, None, device, copied)
                    owner._buffers[leaf] = value
    except BaseException:
        _restore(replaced)
        raise
    return replaced


def _restore(replaced: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for owner, leaf, parameter in replaced:
        owner._parameters[leaf] = parameter


@contextmanager
def filled(module: nn.Module, weights: Weights, **options: Any) -> Iterator[nn.Module]:
    """`fill` for the length of a block, after which the parameters hold no memory again."""
    replaced = fill(module, weights, **options)
    try:
        yield module
    finally:
        _restore(replaced)


def _value(
    weights: Weights,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype | None,
    device: torch.device | str,
    copied: bool,
) -> Tensor:
    value = weights.get(name)
    if value.shape != shape:
        raise FormatError(
            f"tensor {weights.names[name]} of {weights.where} must be {list(shape)} by the config: got "
            f"{list(value.shape)}; config and weights belong to different models"
        )
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.to(device, wanted, copy=copied)
