"""What runs on a GPU machine, without one: emulated kernels, a CPU's clock, made-up processes and records."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qkern.ops import _cuda

BENCH = Path(__file__).parents[2] / "bench"
SHARED = {"time": "2026-01-01T00:00:00", "commit": "abc", "machine": {"gpu": "A GPU", "torch": "2"}}


@pytest.fixture
def clock(bench, monkeypatch):
    """The GPU's timer, with the functions that touch CUDA replaced."""
    timer = bench("gpu.timer")

    def seconds_of(run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def captured(calls):
        last = calls[-1]()
        return lambda: [call() for call in calls[:-1]] + [last.copy_(calls[-1]())], last

    replaced = {"DEVICE": "cpu", "ROUNDS": 3, "COPIES": 2, "ROTATED_BYTES": 0, "COPIED_BYTES": 1 << 16}
    replaced |= {"HOST_CALLS": 10, "HOST_BATCHES": 3, "synchronize": lambda: None, "launch": lambda: None}
    for name, value in {**replaced, "seconds_of": seconds_of, "captured": captured}.items():
        monkeypatch.setattr(timer, name, value)
    monkeypatch.setattr(bench("gpu.streams"), "COMPARED", 8)
    return timer


def said(bench, run, skipped=(), **task) -> list[dict[str, Any]]:
    """What a child reports of a task."""
    stream = io.StringIO()
    report = bench("gpu.report").Report(stream, SHARED)
    report.begin(task, set(skipped))
    run(task, report)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def records_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["record"]["contestant"]: line["record"] for line in lines if "record" in line}


@pytest.mark.parametrize("scheme", ["w4g32", "nf4g64"])
def test_products_are_checked_and_timed(bench, clock, emulator, scheme):
    products = bench("gpu.products")
    products.weight_of.cache_clear()
    lines = said(
        bench,
        products.dequant_matmul,
        op="dequant_matmul",
        scheme=scheme,
        shape="72x128",
        M=3,
        dtype="float16",
    )
    found = records_of(lines)
    for name in ("qkern cuda", "torch float16"):
        record = found[name]
        assert len(record["rounds"]) == 3
        assert "of_copy" in record
        assert record["facts"]["copies"] == 2
        assert 0 < record["error"] <= 2 * record["facts"]["linear_error"] or scheme != "w4g32"
    assert found["copy"]["module"] == "roofline"
    assert found["torch bfloat16"]["error"] > found["torch float16"]["error"]
    assert ("Humming" in found) == (scheme == "w4g32")
    assert [line["at"] for line in lines if "at" in line][-1] == "all together"


def test_a_wrong_product_is_a_line_and_one_that_is_skipped_is_none(bench, clock, monkeypatch):
    products = bench("gpu.products")
    products.weight_of.cache_clear()
    made = {
        "right": lambda x, w: x @ w,
        "wrong": lambda x, w: -(x @ w),
        "nan": lambda x, w: x @ w * torch.nan,
    }

    def maker(function):
        def make(weight, count):
            decoded = weight.decoded.T.half()
            return [lambda x: function(x, decoded)] * count

        return make

    contestants = {name: maker(function) for name, function in made.items()}
    monkeypatch.setattr(products, "CONTESTANTS", contestants | {"crashes": maker(None)})
    task = {"op": "dequant_matmul", "scheme": "w4g32", "shape": "8x64", "M": 2, "dtype": "float16"}
    found = records_of(said(bench, products.dequant_matmul, skipped=["crashes"], **task))
    assert found["right"]["seconds"] > 0
    assert found["wrong"]["absent"].startswith("wrong result: error 2")
    assert found["nan"]["absent"].startswith("wrong result: error nan")
    assert "crashes" not in found


def test_other_ops_are_checked_and_timed(bench, clock, emulator):
    streams = bench("gpu.streams")
    for task in bench("bench_gpu").TASKS:
        if task["op"] in streams.STREAMS and task["op"] != "quantize_activations":
            named = {"op": task["op"], "variant": task["variant"], "shape": "64x256"}
            record = records_of(said(bench, streams.stream, **named))["qkern cuda"]
            assert "of_copy" in record, task
    found = records_of(
        said(bench, streams.gptq_update, op="gptq_update", scheme="w4g128", shape="96x256", dtype="float16")
    )
    assert found["qkern"]["seconds"] > 0
    assert found["qkern cuda, the op alone"]["seconds"] > 0
    found = records_of(said(bench, streams.overhead, op="overhead", scheme="w4g128", shape="64x128"))
    assert {"launch", "torch float16", "qkern QuantLinear", "qkern cuda, the op"} <= set(found)


def test_int8_products_are_checked(bench, clock):
    products = bench("gpu.products")
    products.weight_of.cache_clear()
    found = records_of(said(bench, products.int8_matmul, op="int8_matmul", scheme="w8", shape="64x128", M=24))
    assert found["torch _int_mm"]["seconds"] > 0
    assert found["torch _int_mm"]["error"] == 0


def test_every_case_of_the_sanitizer_is_right(bench, emulator, capsys):
    sanitize = bench("gpu.sanitize")
    assert sanitize.run(torch.device("cpu"), "cuda", 600.0) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("cuda: ")
    assert ", 0 wrong or missing (pack_bits " in last


def test_the_sanitizer_fails_on_what_is_wrong_or_did_not_run(bench, monkeypatch, capsys):
    sanitize = bench("gpu.sanitize")
    with _cuda.emulated(None):
        assert sanitize.run(torch.device("cpu"), "cuda", 0.0) == 1  # no time for a single call
        assert "cuda: 0 calls" in capsys.readouterr().out
    cases = {op: lambda: iter([("case", lambda d, b: False)]) for op in sanitize.CASES}
    monkeypatch.setattr(sanitize, "CASES", cases)
    assert sanitize.run(torch.device("cpu"), "cuda", 60.0) == 1
    assert "pack_bits case: wrong result" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "CASES", {})
    assert sanitize.run(torch.device("cpu"), "cuda", 60.0) == 1
    assert "pack_bits: no case for it" in capsys.readouterr().out


CHILD = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
def say(**message): print(json.dumps(message), flush=True)
for index, task in enumerate(order["tasks"]):
    skipped = order["skipped"].get(f"{task['op']} {task['shape']}", [])
    for name in ("good", "crashes", "hangs"):
        if name in skipped or (name != "good" and task["shape"] != "1x1"): continue
        say(at=name)
        if name == "crashes": os._exit(7)
        if name == "hangs": time.sleep(60)
        record = {"op": task["op"], "shape": task["shape"], "contestant": name, "module": "gpu"}
        say(record=record | {"case": {}, "seconds": 1e-6, "rounds": [1e-6]})
    say(done=index)
"""


def test_a_process_that_dies_or_hangs_costs_one_contestant(bench, tmp_path, monkeypatch, capsys):
    gpu = bench("bench_gpu")
    monkeypatch.setattr(gpu, "SILENCE", 3.0)
    (tmp_path / "child.py").write_text(CHILD)
    todo = [{"op": "pack_bits", "shape": shape} for shape in ("1x1", "2x2", "3x3")]
    options = argparse.Namespace(seconds=60.0, output=tmp_path)
    records = gpu.supervise(todo, options, [sys.executable, str(tmp_path / "child.py")], SHARED)
    assert [(r["shape"], r["contestant"], r.get("absent")) for r in records] == [
        ("1x1", "crashes", "failed; its process ended with code 7"),
        ("1x1", "hangs", "failed; its process silent for 3 s"),
        ("1x1", "good", None),
        ("2x2", "good", None),
        ("3x3", "good", None),
    ]
    written = [json.loads(line) for line in (tmp_path / "pack_bits.jsonl").read_text().splitlines()]
    assert written == records
    options.seconds = 0.0
    assert gpu.supervise(todo, options, [sys.executable, "-c", "raise SystemExit"], SHARED) == []
    options.seconds = 60.0
    assert gpu.supervise(todo, options, [sys.executable, "-c", "raise SystemExit(5)"], SHARED) == []
    out = capsys.readouterr().out
    assert out.count("not measured: 3 cases, of which the first is pack_bits 1x1") == 2
    assert out.count("the process that measures ended with code 5") == gpu.FALSE_STARTS


# The child of bench_gpu.py on a CPU: CUDA kernels cannot run, torch's can.
SERVE = """
import sys, time
sys.path.insert(0, {bench!r})
import bench_gpu
from gpu import timer
def seconds_of(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
def captured(calls):
    last = calls[-1]()
    return lambda: last.copy_(calls[-1]()), last
numbers = dict(DEVICE="cpu", ROUNDS=3, COPIES=2, ROTATED_BYTES=0, COPIED_BYTES=1 << 16)
functions = dict(seconds_of=seconds_of, captured=captured, synchronize=lambda: None)
vars(timer).update(numbers, **functions, machine=lambda: dict(gpu="a CPU"))
bench_gpu.serve()
"""


def test_the_process_that_measures_and_the_one_that_listens(bench, tmp_path, capsys):
    gpu = bench("bench_gpu")
    (tmp_path / "child.py").write_text(SERVE.format(bench=str(BENCH)))
    task = {"op": "dequant_matmul", "scheme": "w4g32", "shape": "72x128", "dtype": "float16"}
    todo = [{**task, "M": 1}, {**task, "M": 3}, {"op": "pack_bits", "variant": "4 dense", "shape": "8x8"}]
    options = argparse.Namespace(seconds=120.0, output=tmp_path)
    records = gpu.supervise(todo, options, [sys.executable, str(tmp_path / "child.py")], SHARED)
    found = {(r["contestant"], r["case"].get("M")): r for r in records}
    for M in (1, 3):
        assert found["torch float16", M]["error"] < 1e-3
        assert "not on a CUDA device" in found["qkern cuda", M]["absent"]
        assert found["torch float16", M]["machine"] == {"gpu": "a CPU"}
    assert found["qkern cuda", None]["absent"].startswith("failed: ")
    out = capsys.readouterr().out
    assert "dequant_matmul w4g32 72x128 M=3: torch float16 " in out
    assert out.count("    qkern cuda: failed: UnsupportedError") == 2


def test_what_options_choose(bench, capsys):
    gpu = bench("bench_gpu")

    def names(*arguments: str) -> list[str]:
        return [gpu.name_of(task) for task in gpu.tasks(gpu.parser().parse_args(arguments))]

    assert len(names()) == len(set(names())) > 60
    assert names("--only", "gptq_update") == ["gptq_update w4g128 4096x4096"]
    few = names("--only", "dequant_matmul", "--schemes", "w4g128", "--rows", "1,64", "--shapes", "8192x8192")
    assert few == ["dequant_matmul w4g128 8192x8192 M=1", "dequant_matmul w4g128 8192x8192 M=64"]
    with pytest.raises(SystemExit, match="2"):
        names("--only", "nonsense")
    assert "allowed are dequant_matmul" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(bench, capsys, tmp_path):
    with pytest.raises(SystemExit, match="1"):
        bench("bench_gpu").main(["--output", str(tmp_path)])
    assert "needs a CUDA device" in capsys.readouterr().err


def record(op: str, name: str, seconds: float, M: int | None = None, **more: Any) -> dict[str, Any]:
    case = {"M": M} if M else {}
    shared = {"op": op, "scheme": "w4g128", "shape": "28672x4096", "contestant": name, "case": case}
    measured = {
        "seconds": seconds,
        "rounds": [seconds] * 3,
        "bytes": 1e6,
        "operations": 1e9,
        "version": "v 1",
    }
    return {**SHARED, "module": "gpu", **shared, **measured, "error": 3e-4, "facts": {}, **more}


def made_up() -> list[dict[str, Any]]:
    """A run that holds most goals; 8 rows take too long on one shape, and few goals have all their places."""
    goals = [record("dequant_matmul", "copy", 1e-3, 1, module="roofline", bytes=4e9, operations=0)]
    for shape, M in itertools.product(("28672x4096", "8192x28672"), (1, 2, 4, 8)):
        slow = shape == "8192x28672" and M == 8
        ours = {"of_copy": 0.9, "facts": {"linear_error": 2e-4}}
        goals += [
            record("dequant_matmul", "qkern cuda", 2e-5 * (1 + slow), M, shape=shape, **ours),
            record("dequant_matmul", "Humming", 3e-5, M, shape=shape),
        ]
    goals += [
        record("dequant_matmul", "qkern cuda", 1e-3, 512, of_copy=0.1, facts={"linear_error": 2e-4}),
        record("dequant_matmul", "torch float16", 6e-4, 512),
        record("gptq_update", "qkern", 8e-3),
        record("pack_bits", "qkern cuda", 1e-3, of_copy=0.6, case={"variant": "4 dense"}),
        record("overhead", "qkern QuantLinear", 9e-6),
        record("overhead", "launch", 3e-6),
        record("dequant_matmul", "gemlite", 0, 1) | {"absent": "not installed"},
    ]
    del goals[-1]["seconds"]
    return goals


def test_goals_are_judged_by_their_worst_place(bench):
    goals = bench("gpu.goals")
    judged = {goal["goal"]: goal for goal in goals.judge(made_up())}
    assert len(judged) == len(goals.GOALS)

    def of(text: str) -> tuple[Any, ...]:
        goal = judged[text]
        measured = goal["measured"] and round(goal["measured"], 3)
        return measured, goal["holds"], goal["where"]

    assert of("w4g128, M=1..8, 28672x4096 and 8192x28672") == (90, "yes", "28672x4096 M=1")
    assert of("w4g128, M=1..8, 8192x8192") == (None, "not measured", "")
    assert of("w4g128, M=1..8, against Humming") == (0.75, "no", "8192x28672 M=8")
    assert of("w4g128, M=8 against M=1") == (2, "no", "8192x28672")
    assert of("w4g128, M=512") == (60, "no", "28672x4096 M=512")
    assert of("GPTQ's column phase, 4096x4096") == (8, "yes", "28672x4096")
    assert of("packing") == (60, "no", "pack_bits 4 dense")
    assert of("error against float64, of torch's linear")[:2] == (1.5, "in part")
    assert of("a call of QuantLinear beyond a launch") == (6, "no", "3.0 us a launch")
    lines = goals.table(list(judged.values())).splitlines()
    assert lines[0].split() == ["goal", "measured", "asked", "holds", "worst", "at"]
    assert "GPTQ's column phase, 4096x4096" in lines[12]
    assert lines[12].split()[-5:] == ["<=", "10", "ms", "yes", "28672x4096"]
    assert goals.judge([])[0]["holds"] == "not measured"


def test_goals_name_cases_that_are_measured(bench):
    """A goal has as many places as the list of cases gives it."""
    gpu, goals = bench("bench_gpu"), bench("gpu.goals")
    run = []
    for task in gpu.tasks(gpu.parser().parse_args([])):
        case = {key: task[key] for key in ("M", "variant") if key in task}
        more = {"scheme": task.get("scheme"), "shape": task["shape"], "case": case, "of_copy": 1.0}
        named = ["qkern", "qkern cuda", "qkern triton", "torch float16", "Humming", "launch"]
        for name in (*named, "qkern QuantLinear"):
            run.append(record(task["op"], name, 1e-6, **more) | {"facts": {"linear_error": 1e-3}})
    assert {goal["goal"]: goal["holds"] for goal in goals.judge(run) if goal["holds"] == "not measured"} == {}
    for goal in goals.judge(run):
        assert goal["places"] >= goal["expected"], goal["goal"]


def test_tables_and_pictures_take_the_records_of_a_gpu(bench, tmp_path, capsys):
    gpu = bench("bench_gpu")
    (tmp_path / "dequant_matmul.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in made_up() if r["op"] == "dequant_matmul")
    )
    gpu.finish(made_up(), tmp_path)
    text = (tmp_path / "dequant_matmul.md").read_text()
    assert "## 28672x4096 w4g128" in text
    assert "| qkern cuda, of copy bandwidth | 1 % |" in text.replace("1.25", "1")
    assert "of peak" not in text
    assert "A GPU, commit abc, 2026-01-01; medians of interleaved runs, graphs over rotated weights" in text
    assert "Not measured: gemlite: not installed." in text
    out = capsys.readouterr().out
    goals = [json.loads(line) for line in (tmp_path / "goals.jsonl").read_text().splitlines()]
    assert len(goals) == len(bench("gpu.goals").GOALS)
    assert all(goal["goal"] in out for goal in goals)
    pictures = sorted(Path(tmp_path).glob("*.svg"))
    if "no tables or no pictures: ModuleNotFoundError" not in out:
        assert [path.name for path in pictures] == [
            f"dequant_matmul-{shape}-w4g128.svg" for shape in ("28672x4096", "8192x28672")
        ]
        assert b"A GPU" in pictures[0].read_bytes() or b"<svg" in pictures[0].read_bytes()


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_pack_bits" name="test_a[cuda-gpu]"/>
<testcase classname="tests.ops.test_pack_bits" name="test_a[cuda-emulated]"><skipped/></testcase>
<testcase classname="tests.ops.test_triton" name="test_b">{}</testcase>
<testcase classname="tests.ops.test_gpu" name="test_c"/>
</testsuite></testsuites>"""


def test_no_tests_on_the_gpu_are_a_failure(bench, tmp_path, capsys):
    path, count = tmp_path / "test.xml", bench("gpu.count_tests")

    def status(text: str | None, *options: str) -> int:
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            count.main([str(path), *options])
        return stopped.value.code

    assert status(None) == 1
    assert "did not come to their end" in capsys.readouterr().err
    assert status(JUNIT.format(""), "--gpu") == 0
    assert "CUDA on the GPU: 1 passed, 0 failed, 0 skipped" in capsys.readouterr().out
    assert status(JUNIT.format("<failure/>"), "--gpu") == 1
    assert status(JUNIT.format("<skipped/>")) == 0
    assert status(JUNIT.format("<skipped/>"), "--gpu") == 1
    assert "no test ran of the kind Triton" in capsys.readouterr().out
    assert status("<testsuites/>") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_script_says_what_it_lacks_and_goes_on(tmp_path):
    def run(*stages: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"QKERN_BENCH_OUTPUT": str(tmp_path / "out"), "PYTHON": sys.executable}
        script = str(BENCH / "gpu.sh")
        return subprocess.run(["bash", script, *stages], env=environment, capture_output=True, text=True)

    done = run("sanitize", "bench")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for stage in ("memcheck", "racecheck", "bench"):
        assert f"{stage} needs a GPU: nvidia-smi names none" in lines
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["memcheck", "FAILED"],
        ["racecheck", "FAILED"],
        ["bench", "FAILED"],
    ]
    done = run("nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown stage nonsense: allowed are build, test" in done.stderr
