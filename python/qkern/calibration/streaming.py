"""Running a decoder one layer at a time over all calibration sequences.

Only the layer at hand holds weights. The hidden states between two layers lie in memory, fp32
``[S, T, H]`` in chunks of sequences; what else a layer is called with (masks, position embeddings) is
recorded once, for every layer, because it may differ from layer to layer.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qkern.calibration.products import fast_products
from qkern.calibration.replay import Replay, replaced_forward
from qkern.calibration.skeleton import Weights, filled
from qkern.errors import UnsupportedError
from qkern.nn import role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["LayerStream", "Stage", "stages_by_role"]

# Tokens that go through a layer at once: enough to keep matmuls busy, few enough to keep attention small.
CHUNK_TOKENS: Final = 4096

# Linears that run at the same time and in any order: tuples of linears that share an input.
Stage = tuple[tuple[str, ...], ...]


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


class LayerStream:
    """The decoder layers of a model and the hidden states between them.

    Parameters
    ----------
    model : PreTrainedModel
        Without weights (`meta_model`, `meta_copy`).
    path : str
        Its list of decoder layers.
    weights : Weights
        What fills it.
    head : str or None
        Path of the output head, which is left without weights.
    device : torch.device or str
        Where layers and hidden states are computed.
    """

    def __init__(
        self,
        model: Any,
        path: str,
        weights: Weights,
        *,
        head: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.path = path
        self.weights = weights
        self.head = head
        self.device = torch.device(device)
        self.layers: Sequence[nn.Module] = list(model.get_submodule(path))
        self._hidden: list[Tensor] = []
        self._ids: list[Tensor] = []
        # By batch size (the last chunk may be smaller), one entry a layer: what it is called with.
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._returns_tuple = False

    def prefix(self, index: int) -> str:
        """Name of layer `index` with a dot behind it."""
        return f"{self.path}.{index}."

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with fp32 weights on the device; they are freed at the end of the block."""
        where = {"prefix": self.prefix(index), "dtype": torch.float32, "device": self.device}
        with filled(self.layers[index], self.weights, **where) as layer:
            yield layer

    @torch.no_grad()
    def embed(self, ids: Tensor, *, tokens: int | None = None) -> None:
        """Compute what the first layer receives and record what every layer is called with.

        Parameters
        ----------
        ids : Tensor
            int64 ``[S, T]``.
        tokens : int, optional
            Tokens of a chunk: what goes through a layer at once. Default: `CHUNK_TOKENS`.

        Raises
        ------
        UnsupportedError
            If the layers are not a plain chain of calls, each taking the hidden states first.
        """
        batch = max(1, (tokens or CHUNK_TOKENS) // ids.shape[1])
        self._ids = list(torch.split(ids.to(self.device), batch))
        with self._surroundings():
            for returns_tuple in (False, True):
                self._returns_tuple = returns_tuple
                self._hidden, self._calls = [], {}
                if all(self._record(chunk) for chunk in self._ids):
                    return
        raise UnsupportedError(
            f"{type(self.model).__name__} does not hand its hidden states from layer to layer in a way that "
            "qkern can follow: method rtn quantizes it without calibration"
        )

    def _record(self, chunk: Tensor) -> bool:
        """Run everything but the layers on one chunk; False if the layers must return tuples."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        received: list[Tensor] = []

        def call(index: int, *args: Any, **kwargs: Any) -> Any:
            named = not args
            hidden = kwargs.pop("hidden_states") if named else args[0]
            if index != len(calls) or not isinstance(hidden, Tensor):
                raise UnsupportedError(f"layer {index} of {type(self.model).__name__} is not called in order")
            received.append(hidden)
            calls.append((args[1:], kwargs))
            if index == len(self.layers) - 1:
                raise _Stop
            return (hidden,) if self._returns_tuple else hidden

        try:
            self._forward(chunk, call)
        except (TypeError, ValueError, IndexError, RuntimeError):
            # A model that unpacks tuples trips over a bare tensor; anything else fails the second time too.
            if self._returns_tuple:
                raise
            return False
        if len(calls) != len(self.layers) or any(h.shape != received[0].shape for h in received):
            return False
        self._hidden.append(received[0].float())
        if not _same_tensors(self._calls.setdefault(len(chunk), calls), calls):
            raise UnsupportedError(
                f"{type(self.model).__name__} hands its layers more than hidden states that depends on the "
                "tokens, which qkern does not follow: method rtn quantizes it without calibration"
            )
        return True

    def _forward(self, chunk: Tensor, call: Callable[..., Any]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(fast_products(self.device))
            for index, layer in enumerate(self.layers):
                stack.enter_context(replaced_forward(layer, partial(call, index)))
            try:
                return self.model(input_ids=chunk, use_cache=False)
            except _Stop:
                return None

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Everything outside the layers and the head with weights, freed at the end."""
        skip = {self.path, *([self.head] if self.head else ())}
        with filled(self.model, self.weights, dtype=torch.float32, device=self.device, skip=skip):
            yield

    @torch.no_grad()
    def run(
        self, index: int, *, watch: Mapping[str, Callable[[Tensor], None]], replay: Replay | None = None
    ) -> None:
        """Run layer `index` on all hidden states and show what linears receive; the states stay.

        Parameters
        ----------
        index : int
            The layer, inside its `layer` block.
        watch : mapping
            Name of a linear inside the layer to a function that is given its input, chunk by chunk. A
            pass ends once all of them have been called.
        replay : Replay, optional
            Of this layer: what it knows is not computed again, and it learns.
        """
        layer = self.layers[index]
        pending: set[str] = set()

        def show(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if not pending:
                return  # all were shown: the rest of the pass is for the replay
            watch[name](args[0])
            pending.discard(name)
            if replay is not None:
                replay.keep(chunk, name, args[0])
            if not pending and (replay is None or chunk):
                raise _Stop

        with ExitStack() as stack:
            for name in watch:
                handle = layer.get_submodule(name).register_forward_pre_hook(partial(show, name))
                stack.callback(handle.remove)
            for chunk, hidden in enumerate(self._hidden):
                pending.update(watch)
                with ExitStack() as surroundings:
                    if replay is not None:
                        surroundings.enter_context(replay.given(chunk, watch))
                        if not chunk:
                            surroundings.enter_context(replay.learning(watch))
                    with suppress(_Stop):
                        self._apply(index, hidden)

    @property
    def states(self) -> list[Tensor]:
        """The hidden states by chunk of sequences, fp32 ``[S, T, H]`` each."""
        return list(self._hidden)

    @torch.no_grad()
    def advance(self, index: int, replay: Replay | None = None) -> None:
        """Replace the hidden states by what layer `index` makes of them, inside its `layer` block."""
        if replay is None:
            self._hidden = self.through(index, self._hidden)
            return
        after = []
        for chunk, hidden in enumerate(self._hidden):
            with replay.given(chunk):
                after.append(self._apply(index, hidden))
        self._hidden = after

    @torch.no_grad()
    def through(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Return what layer `index` makes of `states`, inside its `layer` block."""
        return [self._apply(index, hidden) for hidden in states]

    def _apply(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[len(hidden)][index]
        with fast_products(self.device):
            result = self.layers[index](hidden, *args, **kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def watch_head(self, see: Callable[[Tensor], None]) -> None:
        """After the last layer: show what the output head receives."""
        if self.head is None:
            raise UnsupportedError(f"{type(self.model).__name__} has no output head")

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])
            raise _Stop

        handle = self.model.get_submodule(self.head).register_forward_pre_hook(stop)
        try:
            with self._surroundings():
                for chunk, hidden in zip(self._ids, self._hidden, strict=True):
                    self._forward(chunk, partial(self._give, hidden))
        finally:
            handle.remove()

    @contextmanager
    def ending(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give what follows the last layer, from its outputs fp32 ``[R, H]`` to logits ``[R, V]``.

        R must fit the model's context. The head may be replaced meanwhile.
        """
        where = {"dtype": torch.float32, "device": self.device, "skip": {self.path}}

        @torch.no_grad()
        def logits(rows: Tensor) -> Tensor:
            ids = torch.zeros(1, len(rows), dtype=torch.int64, device=self.device)
            found: Tensor = self._forward(ids, partial(self._give, rows[None])).logits[0]
            return found

        with filled(self.model, self.weights, **where):
            yield logits

    def _give(self, hidden: Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @torch.no_grad()
    def discover(self, index: int, names: Sequence[str]) -> list[Stage]:
        """Order the linears of a layer by running it on one chunk of sequences.

        Linears that are given the very same tensor share an input. Experts are taken together: linears
        whose names differ in a number only form one stage. Linears that were not called come last.

        Parameters
        ----------
        index : int
            The layer, inside its `layer` block.
        names : sequence of str
            Linears inside the layer.
        """
        layer = self.layers[index]
        inputs: list[Tensor] = []  # kept, so that no address is used twice
        groups: list[list[str]] = []

        def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            for known, group in zip(inputs, groups, strict=True):
                if known is args[0]:
                    group.append(name)
                    return
            inputs.append(args[0])
            groups.append([name])

        with ExitStack() as stack:
            for name in names:
                handle = layer.get_submodule(name).register_forward_pre_hook(partial(see, name))
                stack.callback(handle.remove)
            self._apply(index, self._hidden[0])
        called = set(itertools.chain.from_iterable(groups))
        groups.extend([name] for name in names if name not in called)
        return stages_by_role(tuple(dict.fromkeys(group)) for group in groups)


def stages_by_role(groups: Iterable[tuple[str, ...]]) -> list[Stage]:
    """Take groups of linears that share an input as stages, those of experts that do the same as one."""
    stages: dict[str, list[tuple[str, ...]]] = {}
    for group in groups:
        stages.setdefault(role(group[0]), []).append(group)
    return [tuple(stage) for stage in stages.values()]


def _same_tensors(first: Any, second: Any) -> bool:
    """Whether two nests of tuples and dicts have equal tensors in the same places."""
    leaves, others = tree_leaves(first), tree_leaves(second)
    # Layers are mostly called with the very same tensors: each pair is compared once.
    pairs = {(id(one), id(other)): (one, other) for one, other in zip(leaves, others, strict=False)}
    return len(leaves) == len(others) and all(
        one is other or not isinstance(one, Tensor) or (isinstance(other, Tensor) and torch.equal(one, other))
        for one, other in pairs.values()
    )
