"""Times on a GPU: of graphs that go through copies of a weight, of calls, of calls as the host sees them."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEVICE = "cuda"
ROUNDS = 15
# Of each weight: when its turn comes again, no L2 cache has anything of it left.
COPIES, ROTATED_BYTES = 8, 256 << 20
COPIED_BYTES = 1 << 30
HOST_CALLS, HOST_BATCHES = 200, 25


def machine() -> dict[str, Any]:
    """GPU and what torch was built with."""
    properties = torch.cuda.get_device_properties(0)
    memory = round(properties.total_memory / 2**30)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def synchronize() -> None:
    """Wait for the device; raises what went wrong on it."""
    torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds that the device spends on one run."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(calls: list[Callable[[], Tensor]]) -> tuple[Callable[[], None], Tensor]:
    """Record all calls in one graph: its replay, and the memory of the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            last = call()
    return graph.replay, last


def generator(seed: int) -> torch.Generator:
    """Make a generator of its own: torch's may be stuck after a capture that failed."""
    return torch.Generator(DEVICE).manual_seed(seed)


def launch() -> None:
    """Launch a kernel that does nothing, by the shortest way that torch has from Python."""
    torch.cuda._sleep(0)


def copies_of(nbytes: int) -> int:
    """How many copies of a weight are rotated."""
    return max(COPIES, -(-ROTATED_BYTES // max(nbytes, 1)))


def copy() -> tuple[Callable[[], Any], int]:
    """Copy from device to device: the call, and the bytes that it reads and writes."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=DEVICE).random_(generator=generator(0))
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPIED_BYTES


def race(replays: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, list[float]]:
    """Seconds of one of the `count` calls in each ``name: (replay, count)``, in turns, for every round."""
    order, shuffle = list(replays), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(ROUNDS):
        shuffle.shuffle(order)
        for name in order:
            replay, count = replays[name]
            times[name].append(seconds_of(replay) / count)
    return times


def host_race(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds that the host spends in a call, for every batch, in turns.

    The calls of a batch follow one another without waiting, so each must keep the device busy for less time
    than the host: then no launch waits for room in the queue.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(HOST_BATCHES):
        for name, call in calls.items():
            for _ in range(HOST_CALLS // 10):
                call()
            synchronize()
            begin = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / HOST_CALLS)
            synchronize()
    return times


def spread(times: list[float]) -> float:
    """Distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
