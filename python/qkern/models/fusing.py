"""Forwards of known architectures in which the linears that share an input run as one call.

The owner of q, k and v, or of gate and up, gets a class of its own with the forward of its architecture, run
on a view of the owner in which those linears are done already. No code of the architecture is repeated here,
names of modules stay, and a linear that was replaced in the meantime runs as it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.models.architecture import architecture_for
from qkern.nn import SharedInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["fuse_forwards"]


def fuse_forwards(model: nn.Module) -> int:
    """Let quantized linears that read the same activations run as one call, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Of an architecture that qkern knows; others are left as they are. Results stay the same bit for bit.

    Returns
    -------
    int
        How many modules were given such a forward; those that have one already are not counted.
    """
    architecture = architecture_for(getattr(model, "config", None))
    if architecture is None:
        return 0
    count = 0
    try:
        layers: Any = model.get_submodule(architecture.layers)
    except AttributeError:  # a bare decoder, or a wrapper that passes its model's config on
        return 0
    for layer in layers:
        for group in architecture.in_layer(layer).fused:
            owner_name = group[0].rpartition(".")[0]
            owner = layer.get_submodule(owner_name)
            names = tuple(name.rpartition(".")[2] for name in group)
            if isinstance(owner, _Fused) or not all(name in owner._modules for name in names):
                continue
            # A forward that calls super() needs an instance for self, which a view is not.
            if "__class__" in type(owner).forward.__code__.co_freevars:
                continue
            owner.__class__ = _fused_class(type(owner), names)  # type: ignore[arg-type]
            count += 1
    return count


class _Fused:
    """Mark of the classes that `_fused_class` makes, and how their instances are copied and pickled."""

    _fused_base: type[nn.Module]
    _fused_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (self._fused_base, self._fused_names), self.__getstate__()


def _restore(base: type[nn.Module], names: tuple[str, ...]) -> Any:
    kind = _fused_class(base, names)  # type: ignore[arg-type]
    return kind.__new__(kind)


@functools.cache
def _fused_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    input_name = list(inspect.signature(base.forward).parameters)[1]  # the first is self

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = base.forward  # looked up now: somebody may have patched the class
        x: Any = args[0] if args else kwargs.get(input_name)
        shared = self.__dict__.get("_shared_input")
        if shared is None:
            shared = self.__dict__["_shared_input"] = SharedInput()
        linears = [self._modules.get(name) for name in names]
        outs = shared(linears, x)
        if outs is None:
            return plain(self, *args, **kwargs)
        done = {name: _done(linear, x, out) for name, linear, out in zip(names, linears, outs, strict=True)}
        view = _View(self, done)
        result = plain(view, *args, **kwargs)
        if not torch.compiler.is_compiling():
            for name in view.__dict__.keys() - _View.OWN:  # what the forward set on its self
                setattr(self, name, view.__dict__[name])
        return result

    body = {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fused_base": base,
        "_fused_names": names,
    }
    return type(base.__name__, (_Fused, base), body)


def _done(linear: Any, x: Tensor, out: Tensor) -> Callable[[Tensor], Any]:
    """Stand in for a linear whose output for x is there already."""
    return lambda other: out if other is x else linear(other)


class _View:
    """What a forward sees as ``self``: its owner, but for the linears that are done."""

    # No __slots__ and no __setattr__: torch.compile would look for them with __getattr__.
    OWN: Final = frozenset({"_owner", "_done"})

    def __init__(self, owner: Any, done: dict[str, Callable[[Tensor], Any]]) -> None:
        self._owner = owner
        self._done = done

    def __getattr__(self, name: str) -> Any:
        done = self._done.get(name)
        return getattr(self._owner, name) if done is None else done
