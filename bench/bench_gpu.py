"""Every op on a GPU: beside torch and other libraries, against a copy in the same run, and a table of goals.

    python bench/bench_gpu.py [--seconds 480] [--only dequant_matmul,gptq_update] [--rows 1,8]

The contestants of a case take turns in one process, each checked for a right result first. Products are timed
by graph replay over copies of the weight, at least eight and 256 MB of them: none is in the L2 cache when its
turn comes. Other ops are timed by events around a call. Times are medians over rounds. The ceiling is a copy
from device to device of 1 GiB in the same rounds, counted as bytes read plus bytes written.

A contestant that fails is a line. One that takes the process with it, or is silent for minutes, is left
out by the next process, which goes on with that case. Records are appended to JSON lines, a file an op,
as they come; when the seconds are over, the cases that are left are counted. Last come pictures, if
matplotlib is there, and the table of goals, which is in goals.jsonl too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure

BENCH = Path(__file__).resolve().parent
Record = dict[str, Any]

LARGE = ("28672x4096", "8192x28672", "8192x8192")
ROWS = (1, 2, 4, 8, 64, 512, 2048)
# What is measured, the goals first.
TASKS: tuple[Record, ...] = (
    *({"op": "dequant_matmul", "scheme": "w4g128", "shape": s, "rows": ROWS} for s in LARGE),
    {"op": "gptq_update", "scheme": "w4g128", "shape": "4096x4096"},
    {"op": "overhead", "scheme": "w4g128", "shape": "256x256"},
    *(
        {"op": op, "variant": variant, "shape": "57344x8192"}
        for op, variants in {
            "quantize_groupwise": ("w4g128 float16", "w8 float16"),
            "dequantize_groupwise": ("w4g128 float16",),
            "pack_bits": ("4 dense", "3 dense", "4 gptq"),
            "unpack_bits": ("4 dense", "3 dense", "4 gptq"),
            "quantize_activations": ("float16",),
        }.items()
        for variant in variants
    ),
    *(
        {"op": "dequant_matmul", "scheme": scheme, "shape": shape, "rows": (1, 8)}
        for shape in LARGE[:2]
        for scheme in ("w8", "w3g128", "w2g64")
    ),
    {"op": "int8_matmul", "scheme": "w8", "shape": LARGE[0], "rows": (1, 64, 512, 2048)},
    {"op": "dequant_matmul", "scheme": "w4g128z", "shape": LARGE[0], "rows": (1, 8)},
    {"op": "dequant_matmul", "scheme": "nf4g64", "shape": LARGE[0], "rows": (1, 8)},
    {"op": "dequant_matmul", "scheme": "w4g128", "shape": LARGE[0], "rows": (16, 32, 128, 4096)},
    {"op": "dequant_matmul", "scheme": "w4g128", "shape": "4096x14336", "rows": ROWS},
    {"op": "dequant_matmul", "scheme": "w4g128", "shape": "4096x4096", "rows": ROWS},
)
OPS = tuple(dict.fromkeys(task["op"] for task in TASKS))
# A process that says nothing for so long hangs: the longest silence is a peer that compiles itself.
SILENCE = 180.0
# How long a process may go on when the time is over.
GRACE = 15.0
# Processes that may end without having started on anything.
FALSE_STARTS = 2


def tasks(options: argparse.Namespace) -> list[Record]:
    """List what the options choose, a task for each number of rows."""
    made = []
    for task in TASKS:
        chosen = task["op"] in options.only and task.get("scheme") in (*options.schemes, None)
        if not chosen or task["shape"] not in options.shapes:
            continue
        rows = [{"M": M} for M in task.get("rows", ()) if not options.rows or M in options.rows]
        plain = {key: value for key, value in task.items() if key != "rows"}
        made += [{**plain, **more, "dtype": options.dtype} for more in (rows if "rows" in task else [{}])]
    return made


def name_of(task: Record) -> str:
    """Write a task in a line."""
    words = [str(task[key]) for key in ("op", "scheme", "variant", "shape") if key in task]
    return " ".join([*words, f"M={task['M']}"] if "M" in task else words)


def family(task: Record) -> str:
    """Name what shares its contestants: the same but for the rows of x."""
    return name_of({key: value for key, value in task.items() if key != "M"})


# The child -----------------------------------------------------------------------------------------------


def serve() -> None:
    """Work off the tasks that stdin names, and tell stdout; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    import torch

    from gpu import products, streams, timer
    from gpu.report import Broken, Report

    torch.set_grad_enabled(False)
    report = Report(answers, {**order["shared"], "machine": timer.machine()})
    report.say(machine=report.shared["machine"])
    runs = {"dequant_matmul": products.dequant_matmul, "int8_matmul": products.int8_matmul}
    runs |= {"gptq_update": streams.gptq_update, "overhead": streams.overhead}
    end = time.monotonic() + order["seconds"]
    for index, task in enumerate(order["tasks"]):
        if time.monotonic() > end:
            return
        report.begin(task, set(order["skipped"].get(family(task), ())))
        try:
            runs.get(task["op"], streams.stream)(task, report)
            timer.synchronize()
        except Broken:
            os._exit(3)
        except Exception as problem:
            traceback.print_exc()
            report.absent("everyone", f"failed: {type(problem).__name__}: {problem}")
            try:
                timer.synchronize()
            except Exception:
                os._exit(3)
        report.say(done=index)


# The parent ----------------------------------------------------------------------------------------------


class Child:
    """A process that measures, and the lines that it says."""

    def __init__(self, command: list[str], order: Record, log: Path) -> None:
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, seconds: float) -> Record | str:
        """Return what it says next, or why it will say nothing more."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return f"silent for {seconds:.0f} s"
        return f"ended with code {self.process.wait()}" if line is None else json.loads(line)

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=5.0)
        if not self.reader.is_alive():  # else a grandchild has the pipe
            self.process.stdout.close()


def supervise(
    todo: list[Record], options: argparse.Namespace, command: list[str], shared: Record
) -> list[Record]:
    """Have the tasks worked off in as many processes as it takes; records are written as they come."""
    end = time.monotonic() + options.seconds
    records: list[Record] = []
    skipped: dict[str, list[str]] = {}
    told: set[str] = set()
    false_starts = 0

    def write(record: Record) -> None:
        records.append(record)
        with (options.output / f"{record['op']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        news = f"    {record['contestant']}: {record.get('absent')}"[:160]
        if "absent" in record and news not in told:
            told.add(news)
            print(news, flush=True)

    while todo and time.monotonic() < end and false_starts < FALSE_STARTS:
        left = end - time.monotonic()
        order = {"tasks": todo, "skipped": skipped, "seconds": left, "shared": shared}
        child = Child(command, order, options.output / "bench_gpu.log")
        done: set[int] = set()
        at, fresh = None, []
        while True:
            wait = min(SILENCE, max(end + GRACE - time.monotonic(), 1.0))
            said = child.next(wait)
            if isinstance(said, str):
                break
            if "machine" in said:
                print(", ".join(f"{key} {value}" for key, value in said["machine"].items()), flush=True)
            elif "at" in said:
                at = said["at"]
            elif "record" in said:
                fresh.append(said["record"])
            else:
                index = said["done"]
                done.add(index)
                print(line(todo[index], fresh), flush=True)
                for record in fresh:
                    write(record)
                at, fresh = None, []
        child.close()
        false_starts = false_starts + 1 if at is None and not done else 0
        todo = [task for index, task in enumerate(todo) if index not in done]
        late = time.monotonic() >= end
        if at is not None and todo and not late:
            # What the others did in this case is done again, without the one that ended it.
            case = {key: value for key, value in todo[0].items() if key not in ("op", "scheme", "shape")}
            named = {key: todo[0][key] for key in ("op", "scheme", "shape") if key in todo[0]}
            reason = next((r["absent"] for r in fresh if r["contestant"] == at and "absent" in r), "failed")
            reason = f"{reason}; its process {said}"
            write(
                {
                    **shared,
                    **named,
                    "case": case,
                    "module": "gpu",
                    "contestant": at,
                    "version": "",
                    "absent": reason,
                }
            )
            skipped.setdefault(family(todo[0]), []).append(at)
            if skipped[family(todo[0])].count(at) > 1 or at in ("all together", "the weight", "the Hessian"):
                print(f"{name_of(todo[0])}: given up")
                todo = todo[1:]
        elif todo and not late and not done:
            print(f"the process that measures {said}; {options.output / 'bench_gpu.log'} shows why")
    if todo:
        print(f"not measured: {len(todo)} cases, of which the first is {name_of(todo[0])}")
    return records


def line(task: Record, records: list[Record]) -> str:
    """Write a case and its times."""
    words = [f"{name_of(task)}:"]
    for record in records:
        if "seconds" in record and record["module"] != "roofline":
            share = f" {record['of_copy']:.0%}" if "of_copy" in record else ""
            words.append(f"{record['contestant']} {record['seconds'] * 1e6:.1f} us{share};")
    return " ".join(words)


def commit() -> str:
    """Name the commit: as the environment says where there is no git."""
    with contextlib.suppress(OSError):
        return os.environ.get("QKERN_COMMIT") or measure.commit() or "unknown"
    return "unknown"


def words(allowed: tuple[str, ...]) -> Any:
    """Type of an option that is words out of `allowed`, separated by commas."""

    def convert(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"unknown: got {part!r}, allowed are {', '.join(allowed)}")
        return tuple(text.split(","))

    return convert


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    schemes = tuple(dict.fromkeys(task["scheme"] for task in TASKS if "scheme" in task))
    made.add_argument("--only", type=words(OPS), default=OPS, help=f"of {', '.join(OPS)}")
    made.add_argument("--schemes", type=words(schemes), default=schemes, help=f"of {', '.join(schemes)}")
    shapes = tuple(dict.fromkeys(task["shape"] for task in TASKS))
    made.add_argument("--shapes", type=words(shapes), default=shapes, help=f"of {', '.join(shapes)}")
    made.add_argument("--rows", type=measure.numbers, default=[], help="of x, separated by commas")
    made.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="of x")
    made.add_argument("--seconds", type=float, default=480.0, help="after which no case is begun")
    made.add_argument("--output", type=Path, default=measure.RESULTS / "gpu", help="folder")
    return made


def main(arguments: list[str] | None = None) -> None:
    if arguments is None and sys.argv[1:] == ["--child"]:
        serve()
        return
    made = parser()
    options = made.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        made.exit(1, "bench_gpu.py needs a CUDA device: torch sees none\n")
    todo = tasks(options)
    if not todo:
        made.error("no case has all that was asked for")
    options.output.mkdir(parents=True, exist_ok=True)
    shared = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    print(f"commit {shared['commit']}, {len(todo)} cases in {options.seconds:.0f} s", flush=True)
    records = supervise(todo, options, [sys.executable, str(BENCH / "bench_gpu.py"), "--child"], shared)
    finish(records, options.output)
    sys.exit(0 if any("seconds" in record for record in records) else 1)


def finish(records: list[Record], output: Path) -> None:
    """Write tables and draw pictures of the products; write and print the table of goals."""
    from gpu import goals

    cases = dict.fromkeys((r["shape"], r["scheme"]) for r in records if r["op"] == "dequant_matmul")
    try:
        import plot

        tables = [(case, plot.table("dequant_matmul", [*case], output)) for case in cases]
        text = "".join(f"## {' '.join(case)}\n\n{table}\n" for case, table in tables)
        (output / "dequant_matmul.md").write_text(text, encoding="utf-8")
        for path in plot.pictures(output):
            print(path)
    except Exception as problem:  # matplotlib may be missing; the goals must come
        print(f"no tables or no pictures: {type(problem).__name__}: {problem}")
    judged = goals.judge(records)
    with (output / "goals.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(goal) + "\n" for goal in judged)
    print(goals.table(judged))


if __name__ == "__main__":
    main()
