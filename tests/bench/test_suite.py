"""The benchmark suite: its protocol and timer, every contestant's own check, records and tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from qkern import cli
from qkern.schemes import Scheme

BENCH = Path(__file__).parents[2] / "bench"
# Contestants that need nothing, which log when they work.
FAKE = """
import contestant, os, time

def VERSION():
    print("a library that prints")
    return "fake 1"

def prepare(case):
    name = case["variant"]
    if name == "absent":
        raise contestant.Absent("cannot hold this")
    def work():
        if name == "dies":
            os._exit(3)
        with open(case["log"], "a") as log:
            log.write(f"{name} begins\\n")
            time.sleep(0.002)
            log.write(f"{name} ends\\n")
    error = {"wrong": 0.5, "nan": float("nan")}.get(name, 0.001)
    return contestant.Job(calls=[work], error=error, allowed=0.01, bytes=1e6, operations=2e6)
"""
TABLES = (
    "dequantize_groupwise",
    "gguf_decode",
    "gguf_encode",
    "gptq_update",
    "pack_bits",
    "quantize_activations",
    "quantize_groupwise",
)


@pytest.fixture
def options(bench, tmp_path):
    arguments = ["--threads", "1", "--rounds", "3", "--seconds", "0.001", "--rotate", "0"]
    measure = bench("measure")
    return measure.parse(measure.parser(None), [*arguments, "--output", str(tmp_path / "results.jsonl")])


def contestants(bench, module, variants, **case):
    make = bench("measure").Contestant
    return [make(name=name, module=module, case={"variant": name, **case}) for name in variants]


def test_race_interleaves_and_survives_contestants_that_fail(bench, options, tmp_path, monkeypatch, capsys):
    (tmp_path / "bench_fake.py").write_text(FAKE)
    (tmp_path / "bench_missing.py").write_text(
        "INSTALL = 'pip install it'\ndef VERSION():\n    import nonsense\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names, log = ["a", "b", "absent", "wrong", "nan"], tmp_path / "log"
    entries = contestants(bench, "bench_fake", names, log=str(log))
    entries += contestants(bench, "bench_missing", ["peer"])
    results = {r.contestant.name: r for r in bench("measure").race(entries, options)}
    for name in "ab":
        assert len(results[name].rounds) == 3
        assert 0 < results[name].seconds < 0.002  # processor time of one thread: sleeping is not counted
        assert (results[name].version, results[name].absent) == ("fake 1", "")
    assert results["absent"].absent == "cannot hold this"
    assert results["wrong"].absent.startswith("wrong result: error 0.5, allowed 0.01")
    assert results["nan"].absent.startswith("wrong result: error nan")
    assert results["peer"].absent.startswith("not installed (No module named 'nonsense'); pip install it")
    assert not any(results[name].rounds for name in ("absent", "wrong", "nan", "peer"))
    # Never two at once, and in each round every contestant that can.
    lines = log.read_text().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert all(begin.replace("begins", "ends") == end for begin, end in pairs)
    turns = [begin[0] for begin, _ in pairs]
    switches = sum(left != right for left, right in pairwise(turns))
    assert 3 <= switches <= 5
    assert "bench_missing, peer: not installed" in capsys.readouterr().err


def test_a_process_that_dies_is_a_result_that_says_so(bench, options, tmp_path, monkeypatch):
    (tmp_path / "bench_fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    entries = contestants(bench, "bench_fake", ["dies"], log=str(tmp_path / "log"))
    (result,) = bench("measure").race(entries, options)
    assert result.absent.startswith("failed: the process ended with code 3")


def test_every_installed_contestant_gives_right_products(bench, options):
    product = bench("bench_dequant_matmul")
    options.rounds, options.computes = 1, ["int8 bf16", "float bf16", "float fp32"]
    entries = [
        entry
        for scheme in ("w4g32", "w8g32", "nf4g64")
        for entry in product.contestants(scheme, 96, 256, [1, 5] if scheme == "w4g32" else [5], options)
    ]
    # Dense weights are the same for every scheme.
    entries = list(
        {(e.name, e.case["M"], e.name.startswith("torch") or e.case["scheme"]): e for e in entries}.values()
    )
    results = bench("measure").race(entries, options)
    packages = {"qkern": "qkern", "torch": "torch", "ggml": "llama_cpp", "onnxruntime": "onnxruntime"}
    packages |= {"bitsandbytes": "bitsandbytes"}
    for result in results:
        name, scheme = result.contestant.name, result.contestant.case["scheme"]
        if importlib.util.find_spec(packages[name.split()[0]]) is None:
            assert result.absent.startswith("not installed"), name
        elif result.absent:
            assert "repack" in name, f"{name} {scheme}: {result.absent}"  # as the machine has it
        else:
            assert result.rounds, name
            assert 0 <= result.error < 0.02, name
            # The information of a weight, or what a type or dense weight takes.
            assert result.bytes * 8 / (80 * 256) >= Scheme.parse(scheme).bits, name


def test_a_wrong_weight_is_seen(bench):
    dense, contestant = bench("peers.torch_dense"), bench("contestant")
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        right = dense.weights("float32", 8, 16, 0)[0]
        x = torch.randn(3, 16)
        truth = x.double() @ right.double().T
        assert contestant.relative_error(x @ right.T, truth) < 1e-6
        assert contestant.relative_error(x @ right.roll(1, 0).T, truth) > 0.5
        assert math.isnan(contestant.relative_error(x @ (right * math.nan).T, truth))


@pytest.mark.parametrize("op", TABLES)
def test_cases_are_right_and_counted(bench, op):
    module = bench(f"bench_{op}")
    for name in module.CASES:
        job = module.prepare({"variant": name, "N": 48, "K": 256, "threads": 1})
        assert job.error <= job.allowed, name
        assert job.bytes + job.operations > 0
        job.calls[0]()


def test_gptq_jobs_time_themselves(bench):
    gptq = bench("bench_gptq")
    for name in gptq.VARIANTS:
        job = gptq.prepare({"variant": name, "order": "desc_act", "N": 16, "K": 256, "threads": 1})
        assert job.error <= job.allowed
        (seconds,) = bench("contestant").time_job(job, 0.0, lambda: 0.0)
        assert 0 < job.facts["columns"][-1] < seconds


@pytest.mark.skipif(shutil.which("c++") is None, reason="roofline.cpp needs a C++ compiler")
def test_ceilings_and_the_table_of_an_op(bench, options, tmp_path, monkeypatch, capsys):
    roofline = bench("roofline")
    small = roofline.contestants(size=1 << 20, rounds=100)
    monkeypatch.setattr(roofline, "contestants", lambda: small)
    output = tmp_path / "out.jsonl"
    arguments = ["--threads", "2", "--rounds", "1", "--seconds", "0.001", "--shape", "32x256"]
    script = bench("bench_quantize_activations")
    with pytest.raises(SystemExit) as stopped:
        bench("table").main(
            None,
            script.__file__,
            script.CASES,
            arguments=[*arguments, "--cases", "g32", "--output", str(output)],
        )
    assert stopped.value.code == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    rates = roofline.ceilings(records)
    assert {"read", "copy", "int8", "fp32"} <= set(rates)
    assert all(rate > 0 for each in rates.values() for rate in each)
    records = [record for record in records if record["module"] != "roofline"]
    assert [record["contestant"] for record in records] == ["float32 g32", "bfloat16 g32"]
    for record in records:
        assert record["tier"]
        assert record["clock"] == "wall-clock time"
        assert record["commit"]
        assert record["machine"]["cores"] >= 1
    assert "% " not in capsys.readouterr().out.splitlines()[0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="roofline.cpp needs a C++ compiler")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("streaming", [0, 1])
def test_the_copy_that_is_timed_copies(bench, threads, streaming):
    roofline, size = bench("roofline"), 3 * 1024
    numpy = importlib.import_module("numpy")
    memory, address = roofline.buffer(2 * size)
    offset = address - memory.ctypes.data
    memory[offset : offset + 2 * size] = numpy.arange(2 * size) % 251
    roofline.library().roofline_copy(address + size, address, size, threads, streaming)
    assert (memory[offset + size : offset + 2 * size] == memory[offset : offset + size]).all()


def record(contestant, M, seconds, time="2026-01-01T00:00:00", **more):
    shared = {"op": "dequant_matmul", "shape": "8x16", "scheme": "w4g16", "threads": 2, "time": time}
    shared |= {"machine": {"cpu": "A CPU", "cores": 2}, "commit": "abc", "realtime": False, "others": 0.0}
    shared |= {"version": "v 1", "module": "bench_dequant_matmul", "case": {"M": M}}
    timed = {"seconds": seconds, "rounds": [seconds], "bytes": 20e6, "operations": 2e8 * M}
    return shared | timed | {"contestant": contestant} | more


def ceiling(name, **rate):
    return record(
        name, 0, 1.0, module="roofline", bytes=rate.get("gbps", 0) * 1e9, operations=rate.get("gops", 0) * 1e9
    )


def test_tables_are_written_between_comments_and_only_once(bench, tmp_path):
    plot = bench("plot")
    records = [record("qkern int8 bf16", 1, 0.001), record("ggml q4_0 repacked", 1, 0.0015)]
    records += [
        record("qkern int8 bf16", 1, 9.0, time="2025-01-01T00:00:00"),
        record("unasked", 1, 0.1, scheme="w8"),
    ]
    records += [record("torch bf16", 1, 0.0) | {"absent": "not installed"}]
    del records[-1]["seconds"]
    records += [ceiling("read 0", gbps=30), ceiling("read 1", gbps=40), ceiling("int8 zmm", gops=800)]
    (tmp_path / "dequant_matmul.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    text = "before\n<!-- bench: dequant_matmul 8x16 w4g16 -->\nstale\n<!-- /bench -->\nafter\n"
    text += "<!-- bench: pack_bits -->\n<!-- /bench -->\n"
    written = plot.rewrite(text, tmp_path)
    lines = written.splitlines()
    assert "stale" not in lines
    assert (lines[0], lines[lines.index("<!-- /bench -->") + 1]) == ("before", "after")
    assert "| milliseconds | M=1 |" in lines
    assert "| qkern int8 bf16 | 1 |" in lines
    assert "| qkern int8 bf16, of read bandwidth | 50 % |" in lines
    assert "| qkern int8 bf16, of peak | 25 % |" in lines
    assert "| qkern int8 bf16, times as fast as the best peer | 1.50 |" in lines
    assert "Not measured: torch bf16: not installed." in lines
    assert "unasked" not in written
    assert "Not measured yet: `qkern bench pack_bits`." in lines
    assert plot.rewrite(written, tmp_path) == written
    document = tmp_path / "README.md"
    document.write_text(text)
    for check, code in ((True, 1), (False, 0), (True, 0)):
        with pytest.raises(SystemExit) as stopped:
            plot.main([str(document), "--results", str(tmp_path), *(["--check"] if check else [])])
        assert stopped.value.code == code
    assert document.read_text() == written


@pytest.mark.parametrize("page", ["docs/speed.md", "bench/results/README.md"])
def test_tables_are_those_of_the_records(bench, page):
    text = (BENCH.parent / page).read_text(encoding="utf-8")
    assert bench("plot").rewrite(text) == text


def test_a_new_measurement_replaces_its_group_alone(bench, options):
    measure = bench("measure")
    measure.save([record("qkern", 1, 1.0), record("gone", 1, 1.0)], options)
    measure.save([record("qkern", 1, 1.0, scheme="w8")], options)
    measure.save([record("qkern", 1, 0.5)], options)
    assert [(r["contestant"], r["scheme"], r["seconds"]) for r in measure.load(options.output)] == [
        ("qkern", "w8", 1.0),
        ("qkern", "w4g16", 0.5),
    ]


def test_sets_name_shapes_and_schemes_that_exist(bench):
    known = tomllib.loads((BENCH / "shapes.toml").read_text())
    for chosen in known["sets"].values():
        assert bench("measure").shapes(known["models"])(",".join(chosen["shapes"]))
        for scheme in chosen["schemes"]:
            assert str(Scheme.parse(scheme)) == scheme
            assert bench("peers").information(scheme, 4, 256) > 4 * 256 * Scheme.parse(scheme).bits / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "0x512"], "a shape is NxK.*0x512"),
        (["--shapes", "512x512x2"], "a shape is NxK.*Llama-3-8B"),
        (["--rows", "1,0"], "at least 1: got '0'"),
        (["--rounds", "x"], "at least 1: got 'x'"),
        (["--threads=-1"], "at least 1: got '-1'"),
        (["--seconds", "0"], "at least 0.001"),
        (["--tier", "avx9"], "this machine runs scalar.*avx9"),
        (["--schemes", "w4g128,w5"], "unsupported bits"),
        (["--computes", "int4"], "int8 bf16.*int4"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench("bench_dequant_matmul").main(arguments)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_qkern_bench_runs_a_script_of_the_checkout(capfd):
    for arguments, code in (((), 0), (("nonsense",), 2), (("plot", "--", "--nonsense"), 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", *arguments])
        assert stopped.value.code == code
        out, err = capfd.readouterr()
        if not arguments:
            ops = sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))
            listed = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
            assert listed == [*ops, "roofline", "plot", "quality", "micro"]
        else:
            assert "nonsense" in err


def test_qkern_bench_without_a_checkout_says_what_it_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qkern.cli.bench.__file__", str(tmp_path / "site-packages" / "bench.py"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("qkern: error: qkern bench needs a checkout")
