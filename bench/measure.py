"""The one timer of the benchmarks: contestants in processes of their own, measured in interleaved rounds.

`race` starts each module of the contestants as a process (see contestant.py), has every result checked, and
then goes through all contestants round after round in changing order, one at a time: the others block on
their pipes, and a process is left alone until its thread pool has stopped spinning. A time is the median
over rounds of a run's median. On a machine that others use too, a run that they disturbed is repeated, and
how much processor they had is recorded with the result.

Results are JSON objects, a line each, in bench/results: `save`. A new measurement of a group (the contestants
that were measured against each other) replaces the old one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import platform
import random
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestant import PROCESSOR_TIME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
# Modules that are qkern itself or need its environment; everything else runs under the peers' Python.
OWN = ("bench_", "roofline")
# A run during which others had more processors than this is repeated, at most so often, unless its clock is
# that of one thread's processor time, which they hardly disturb.
DISTURBED, RETRIES = 0.2, 4
# How `absent` starts when a contestant that is installed gave no result, or a wrong one.
FAULTS = ("failed", "wrong")
SILENCE = 900  # seconds after which a process that does not answer counts as hung


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who is measured at what: `module` prepares `case`, in a process with `tier` forced."""

    name: str
    module: str
    case: dict[str, Any]
    tier: str | None = None


@dataclass(kw_only=True)
class Result:
    """What came of a contestant: one median a round, or `absent` says why there is none."""

    contestant: Contestant
    version: str = ""
    clock: str = ""
    absent: str = ""
    error: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance of the rounds' quartiles over their median."""
        if len(self.rounds) < 3:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / self.seconds


class Failed(Exception):
    """A contestant's process ended or failed."""


class Process:
    """A contestant's process and the pipe to it."""

    def __init__(self, module: str, tier: str | None, options: argparse.Namespace) -> None:
        own = module.startswith(OWN)
        python = sys.executable if own else options.pythons.get(module, options.peers_python)
        threads = str(options.threads)
        path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH") if own else None)))
        environment = os.environ | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        if tier is not None:
            environment["QKERN_CPU_TIER"] = tier
        # Some libraries leave logs where they run.
        self._folder = tempfile.TemporaryDirectory()
        command = [python, "-c", "import contestant; contestant.serve()", module, threads]
        self._child = subprocess.Popen(
            command,
            cwd=self._folder.name,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
        )
        self._realtime = options.realtime

    @functools.cached_property
    def hello(self) -> dict[str, Any]:
        """What the process says when it is ready, or why it never will be."""
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout = self._child.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], SILENCE)[0]:
            raise Failed(f"silent for {SILENCE} s")
        line = stdout.readline()
        if not line:
            raise Failed(f"the process ended with code {self._child.wait()}; --verbose shows why")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Failed("the process has ended") from None
        return self._answer()

    def processor_seconds(self) -> float:
        """Processor time of all its threads."""
        return _clock_of(self._child.pid)

    def rest(self) -> None:
        """Wait until the process uses no processor: the threads of a pool spin for a while after work."""
        end = time.monotonic() + 2
        while time.monotonic() < end:
            before = self.processor_seconds()
            time.sleep(0.003)
            if self.processor_seconds() - before < 1e-4:
                return
        raise Failed("its threads do not come to rest")

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """Let others on the machine wait meanwhile, if the options say so."""
        if self._realtime:
            self._schedule(os.SCHED_RR, 1)
        try:
            yield
        finally:
            if self._realtime:
                self._schedule(os.SCHED_OTHER, 0)

    def _schedule(self, policy: int, priority: int) -> None:
        for task in Path(f"/proc/{self._child.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(task.name), policy, os.sched_param(priority))

    def close(self) -> None:
        """End the process, which only waits for commands."""
        self._child.kill()
        self._child.communicate()
        self._folder.cleanup()


def _clock_of(pid: int) -> float:
    """Processor time of a process, to the nanosecond where the kernel tells."""
    if sys.platform != "linux":  # no such clock: `rest` then waits for its least time only
        return 0.0
    return time.clock_gettime((~pid << 3) | 2)


def _busy() -> float:
    """Processor seconds that the whole machine has spent, those taken by other virtual machines included."""
    if sys.platform != "linux":
        return 0.0
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, interrupts, soft, stolen = fields
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _run(process: Process, job: int, result: Result, seconds: float) -> None:
    """Add to a result the median of one run, and the processors that others had meanwhile."""
    best: tuple[float, float] | None = None
    for _ in range(1 + RETRIES):
        begin, busy, own = time.monotonic(), _busy(), process.processor_seconds()
        with process.urgent():
            reply = process.ask(run=job, seconds=seconds)
        wall = time.monotonic() - begin
        others = max(_busy() - busy - (process.processor_seconds() - own), 0.0) / wall
        process.rest()
        if best is None or others < best[1]:
            best = (statistics.median(reply["seconds"]), others)
            result.facts = reply["facts"]
        if others <= DISTURBED or result.clock == PROCESSOR_TIME:
            break
    assert best is not None
    result.rounds.append(best[0])
    result.others.append(best[1])


@contextlib.contextmanager
def _alone(path: str | None):
    """Hold the lock that keeps two benchmarks from measuring at once."""
    if path is None:
        yield
        return
    with Path(path).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(entry: Contestant, process: Process) -> tuple[Result, int]:
    """Have a case prepared and checked: what is known of it, and its number in the process."""
    result = Result(contestant=entry)
    try:
        result.version, result.clock = process.hello.get("ready", ""), process.hello.get("clock", "")
        reply = process.hello if "absent" in process.hello else process.ask(prepare=entry.case)
    except Failed as why:
        result.absent = f"failed: {why}"
        return result, -1
    result.absent = reply.get("absent", "")
    if result.absent:
        return result, -1
    result.error, result.bytes, result.operations = reply["error"], reply["bytes"], reply["operations"]
    result.facts = reply["facts"]
    # Not `>`: the error may be NaN.
    if not result.error <= reply["allowed"]:
        result.absent = f"wrong result: error {result.error:.2g}, allowed {reply['allowed']:.2g}"
    return result, reply["id"]


def race(contestants: list[Contestant], options: argparse.Namespace) -> list[Result]:
    """Measure contestants against each other; a result for each, in their order."""
    processes: dict[tuple[str, str | None], Process] = {}
    try:
        for entry in contestants:
            key = entry.module, entry.tier
            processes[key] = processes.get(key) or Process(*key, options)
        prepared = [_prepare(entry, processes[entry.module, entry.tier]) for entry in contestants]
        runners = [(result, job) for result, job in prepared if not result.absent]
        for key in {(result.contestant.module, result.contestant.tier) for result, _ in runners}:
            processes[key].rest()
        order = random.Random(0)
        for _ in range(options.rounds):
            order.shuffle(runners)
            with _alone(options.lock):
                for result, job in runners:
                    if result.absent:
                        continue
                    process = processes[result.contestant.module, result.contestant.tier]
                    try:
                        _run(process, job, result, options.seconds)
                    except Failed as why:
                        result.absent = f"failed: {why}"
    finally:
        for process in processes.values():
            process.close()
    results = [result for result, _ in prepared]
    for line in dict.fromkeys(
        f"{r.contestant.module}, {r.contestant.name}: {r.absent}" for r in results if r.absent
    ):
        print(line, file=sys.stderr)
    return results


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """Type of an option that is a number from `least` on."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if (number := kind(text)) >= least:
                return number
        raise argparse.ArgumentTypeError(f"must be a number of at least {least}: got {text!r}")

    return convert


def numbers(text: str) -> list[int]:
    """Type of an option that is whole numbers from 1 on, separated by commas."""
    return [int(at_least(1)(part)) for part in text.split(",")]


def shape(text: str) -> tuple[int, int]:
    """Type of an option that is the shape of a weight."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"a shape is NxK, for example 4096x3584: got {text!r}")
    N, K = text.split("x")
    return int(N), int(K)


def shapes(models: dict[str, list[str]]) -> Callable[[str], list[tuple[int, int]]]:
    """Type of an option that is shapes, or the names of `models`, separated by commas."""

    def convert(text: str) -> list[tuple[int, int]]:
        try:
            return [shape(each) for part in text.split(",") for each in models.get(part, [part])]
        except argparse.ArgumentTypeError as why:
            raise argparse.ArgumentTypeError(
                f"{why}; names are {', '.join(models)}" if models else why
            ) from None

    return convert


def parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=_Help)
    made.add_argument("--threads", type=at_least(1), default=cores(), help="of every contestant")
    made.add_argument("--tier", help="CPU tier to force in qkern; `qkern info` names them")
    made.add_argument("--rounds", type=at_least(1), default=7, help="in which all contestants take turns")
    made.add_argument(
        "--seconds", type=at_least(1e-3, float), default=0.1, help="about how long one run of a round takes"
    )
    made.add_argument(
        "--rotate", type=at_least(0), default=512, help="MB of weights that are gone round through"
    )
    made.add_argument("--peers-python", default=sys.executable, help="Python that has the peers")
    made.add_argument("--gptqmodel-python", help="Python that has GPTQModel, if another")
    made.add_argument("--no-peers", action="store_true", help="measure qkern and the ceilings alone")
    made.add_argument(
        "--realtime",
        action="store_true",
        help="let others on the machine wait while a contestant runs: for root",
    )
    made.add_argument("--lock", help="file to lock while a round is measured")
    made.add_argument("--output", type=Path, help="JSON lines; default bench/results/<benchmark>.jsonl")
    made.add_argument("--verbose", action="store_true", help="show what the processes print")
    made.set_defaults(pythons={})
    return made


def parse(made: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse, and note which peer has a Python of its own."""
    options = made.parse_args(arguments)
    if options.tier is not None:
        from qkern.ops._native import usable_tiers

        if options.tier not in (usable := tuple(usable_tiers())):
            made.error(f"--tier: this machine runs {', '.join(usable)}: got {options.tier!r}")
    if options.gptqmodel_python:
        options.pythons = {"peers.gptqmodel_gptq": options.gptqmodel_python}
    return options


def machine() -> dict[str, Any]:
    """CPU model, how many of its cores, and the system."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {key.strip(): value.strip() for key, value in found.items()}
        model = found.get("model name", model)
        if "cpu family" in found:
            model += f" (family {found['cpu family']}, model {found['model']})"
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(terse=True)}


def commit() -> str:
    """Short hash of the checkout, marked if the working tree differs in what is measured."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(BENCH), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../python")
    return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")


def records(
    op: str, results: list[Result], options: argparse.Namespace, **group: Any
) -> list[dict[str, Any]]:
    """JSON objects of a race's results; `group` names what was measured together."""
    shared = {
        "op": op,
        **group,
        "threads": options.threads,
        "machine": machine(),
        "realtime": options.realtime,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    made = []
    for result in results:
        entry = result.contestant
        record = shared | {"contestant": entry.name, "module": entry.module, "case": entry.case}
        record |= {"version": result.version, "tier": result.facts.get("tier", entry.tier)}
        if result.absent:
            record["absent"] = result.absent
        else:
            record |= {
                "seconds": result.seconds,
                "spread": round(result.spread, 4),
                "clock": result.clock,
                "bytes": result.bytes,
                "operations": result.operations,
                "error": result.error,
                "others": round(statistics.median(result.others), 3),
                "rounds": [float(f"{seconds:.5g}") for seconds in result.rounds],
                "facts": result.facts,
            }
        made.append(record)
    return made


def load(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(new: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """Write records; those of an older measurement of the same group go."""

    def group(record: dict[str, Any]) -> str:
        keys = ("op", "shape", "scheme", "threads", "machine", "forced", "order")
        return json.dumps([record.get(key) for key in keys])

    path = options.output or RESULTS / f"{new[0]['op']}.jsonl"
    replaced = {group(record) for record in new}
    kept = [record for record in load(path) if group(record) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept + new))
    print(f"{len(new)} records written to {path}", file=sys.stderr)
    return path
