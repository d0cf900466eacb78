"""The side of a benchmark that is measured: a process of its own that does what it is told over a pipe.

`measure.Process` starts ``serve`` on a module that has

- ``VERSION``, a function without arguments: what is measured, e.g. ``"onnxruntime 1.31.1"``; an ImportError
  there means that the peer is not installed, and `INSTALL` says how to install it;
- ``prepare(case) -> Job``: builds the work and the evidence that its result is right, or raises `Absent`.

Commands and answers are JSON objects, a line each: ``{"prepare": case}`` -> the facts of the job,
``{"run": id, "seconds": s}`` -> ``{"seconds": [..], "facts": {..}}``. Between two commands the process
blocks on the pipe.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


PROCESSOR_TIME = "processor time"


class Absent(Exception):
    """Why a contestant cannot take part in a case."""


@dataclass(kw_only=True)
class Job:
    """Work that is ready to be timed.

    `calls` do the same on different memory and are gone round through. `error` is that of the result against
    `allowed`; `bytes` and `operations` are those of one call, which the speed counts. With `own_clock`
    a call times itself, because only a part of what it does counts, and returns the seconds; `facts` are kept
    with the result, and calls may add to them.
    """

    calls: list[Callable[[], Any]]
    error: float = 0.0
    allowed: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    own_clock: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    memory: Any = None  # what the calls point into
    turn: int = 0


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, in float64."""
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def sample_rows(N: int, count: int = 48) -> Tensor:
    """Rows of a weight at which a product is checked: the first, the last and some between."""
    import torch

    return torch.linspace(0, N - 1, min(N, count)).round().long().unique()


def copies(size: int, rotate: float) -> int:
    """How often something of `size` bytes must exist to fill `rotate` bytes."""
    return max(-(-int(rotate) // max(size, 1)), 1)


def time_job(job: Job, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of calls that follow one another for about `seconds`, after one that is not counted."""

    def next_call() -> Callable[[], Any]:
        job.turn += 1
        return job.calls[job.turn % len(job.calls)]

    if not job.own_clock:
        next_call()()
    # As timeit does: Python's collections would fall into some calls and not into others.
    gc.collect()
    gc.disable()
    times: list[float] = []
    try:
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            call = next_call()
            begin = clock()
            own = call()
            times.append(own if job.own_clock else clock() - begin)
            # Or the next call would have to ask the system for new pages, which cost more than many a kernel.
            del own
    finally:
        gc.enable()
    return times


def serve() -> None:
    """Answer commands on stdin until it ends. Arguments: module, threads."""
    module_name, threads = sys.argv[1], int(sys.argv[2])
    # Whatever libraries print goes to stderr: stdout carries the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    module = importlib.import_module(module_name)
    try:
        version = module.VERSION()
    except ImportError as error:
        install = getattr(module, "INSTALL", "")
        answer(absent=f"not installed ({error}); {install}")
        return
    # The calling thread does all the work of one thread, and a busy machine does not disturb its clock.
    clock = time.thread_time if threads == 1 else time.perf_counter
    answer(ready=version, clock=PROCESSOR_TIME if threads == 1 else "wall-clock time")
    jobs: list[Job] = []
    for line in sys.stdin:
        command = json.loads(line)
        if "torch" in sys.modules:  # some modules import it only when they prepare
            sys.modules["torch"].set_num_threads(threads)
            sys.modules["torch"].set_grad_enabled(False)
        try:
            if "prepare" in command:
                job = module.prepare(command["prepare"] | {"threads": threads})
                jobs.append(job)
                facts = {key: getattr(job, key) for key in ("error", "allowed", "bytes", "operations")}
                answer(id=len(jobs) - 1, **facts, facts=job.facts)
            else:
                job = jobs[command["run"]]
                answer(seconds=time_job(job, command["seconds"], clock), facts=job.facts)
        except Absent as why:
            answer(absent=str(why))
        except Exception as error:  # the others go on; the line says what happened here
            traceback.print_exc()
            answer(failed=f"{type(error).__name__}: {error}")
