"""Runs of a layer that leave out what they would compute as before."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from qkern.nn import role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

__all__ = ["Replay", "replaced_forward"]

# Bytes of inputs that are kept of a layer; what comes after them runs again.
_LIMIT: Final = 1 << 28


class Replay:
    """Results of a layer's modules that end in a linear, from what that linear received before.

    While linears are quantized one after another the layer runs again for each. Of an attention block only
    its last linear still changes then: its input is kept, and what computed that does not run again. To be
    used as long as nothing changes that comes before a linear that was watched.

    Parameters
    ----------
    layer : Module
        The layer.
    limit : int
        Bytes of inputs to keep; the chunks of hidden states that come after those run whole.
    """

    def __init__(self, layer: nn.Module, limit: int = _LIMIT) -> None:
        self._layer = layer
        self._left = limit
        # By linear: the module that it ends, and what gives that module's result from the linear's.
        self._ends: dict[str, tuple[str, Callable[[Any], Any]]] = {}
        self._inputs: dict[int, dict[str, tuple[Tensor, int]]] = defaultdict(dict)

    def keep(self, chunk: int, name: str, x: Tensor) -> None:
        """Keep what a linear received of a chunk, if it may end a module."""
        if (chunk == 0 or name in self._ends) and name not in self._inputs[chunk] and x.nbytes <= self._left:
            self._left -= x.nbytes
            self._inputs[chunk][name] = x, x._version

    @contextmanager
    def learning(self, names: Iterable[str]) -> Iterator[None]:
        """See which of some linears end a module, while the whole layer runs on the first chunk."""
        ran: Counter[str] = Counter()
        results: dict[str, Any] = {}
        ends: dict[str, tuple[str, Callable[[Any], Any]]] = {}
        linears: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = name.rpartition(".")[0]
            # Linears that differ in a number are changed at once, even where one comes before the other.
            if path and role(name) == name:
                linears[path].append(name)

        def of_linear(name: str, module: nn.Module, args: Any, result: Any) -> None:
            ran[name] += 1
            results[name] = result

        def of_module(path: str, module: nn.Module, args: Any, result: Any) -> None:
            ran[path] += 1
            for name in linears[path]:
                wrap = _wrapping(results.pop(name, None), result)
                if wrap is not None:
                    ends[name] = path, wrap

        with ExitStack() as stack:
            for path, inside in linears.items():
                hooks = {name: partial(of_linear, name) for name in inside} | {path: partial(of_module, path)}
                for place, hook in hooks.items():
                    handle = self._layer.get_submodule(place).register_forward_hook(hook)
                    stack.callback(handle.remove)
            yield
        for name, (path, wrap) in ends.items():
            if ran[name] == ran[path] == 1:
                self._ends[name] = path, wrap
        for name in self._inputs[0].keys() - self._ends.keys():
            self._left += self._inputs[0].pop(name)[0].nbytes

    @contextmanager
    def given(self, chunk: int, watched: Iterable[str] = ()) -> Iterator[None]:
        """Give modules the results of a chunk; not those with a watched linear before their last."""
        with ExitStack() as stack:
            for name, (x, version) in self._inputs.get(chunk, {}).items():
                path, wrap = self._ends.get(name, ("", None))
                inside = any(other.startswith(f"{path}.") and other != name for other in watched)
                # Of another version: something wrote to it since.
                if wrap is None or inside or x._version != version:
                    continue
                linear = self._layer.get_submodule(name)
                stack.enter_context(
                    replaced_forward(
                        self._layer.get_submodule(path), partial(_again, linear=linear, x=x, wrap=wrap)
                    )
                )
            yield


def _again(*_: Any, linear: nn.Module, x: Tensor, wrap: Callable[[Any], Any], **__: Any) -> Any:
    return wrap(linear(x))


def _wrapping(linear: Any, module: Any) -> Callable[[Any], Any] | None:
    """Return what makes a module's result of its last linear's; None if that is not all there is to it."""
    if linear is None:
        return None
    if module is linear:
        return lambda result: result
    if type(module) is tuple and module and module[0] is linear and all(part is None for part in module[1:]):
        rest = module[1:]
        return lambda result: (result, *rest)
    return None


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside the block."""
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if had is not None:
            module.forward = had
