"""`plan` against what the runs really write and need; what it lists, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkern
from qkern.checkpoints import TensorFolder
from qkern.cli import main
from qkern.errors import InputError, UnsupportedError
from qkern.evaluation import bpw_linear
from qkern.nn.state import QuantModule
from qkern.pipelines import estimates, export_gguf, load, plan, quantize
from qkern.search import MixedPrecision

IDS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))
MIXED = {"q_proj": "w2g32", "*.layers.0.mlp.*": "w8", "*.layers.1.mlp.*": "w3g32z", "lm_head": "w4g32"}
SHIPPED = Path(qkern.__file__).parent / "demo" / "data" / "bible"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Maker of folders of tiny bf16 models."""

    def make(model_type="llama", **sizes):
        path = tmp_path_factory.mktemp(model_type) / "model"
        tiny(model_type, dtype=torch.bfloat16, **sizes).save_pretrained(path)
        return path

    return make


def untimed(*args, **options):
    return plan(*args, timed=False, **options)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"scheme": "w4g32"}),
        ("llama", {"scheme": "w4g32z", "method": "awq", "include": ["lm_head"]}),
        ("llama", {"scheme": "w3g32z", "skip": ["o_proj"]}),
        ("llama", {"assignment": MIXED}),
        ("llama", {"assignment": MIXED, "format": "gptq_v2"}),
        ("qwen2", {"scheme": "w8"}),
        ("llama", {"scheme": "w8a8", "method": "rtn"}),
        ("llama", {"scheme": "w8a8", "method": "smoothquant"}),
        ("llama", {"scheme": "nf4g32d", "method": "rtn"}),
        ("llama", {"scheme": "fp4g32", "method": "rtn"}),
        ("llama", {"assignment": {"q_proj": "w8a8", "*.mlp.*": "w4g32a8"}}),
        ("gpt2", {"scheme": "w2g16"}),
        ("mixtral", {"scheme": "w4g32", "skip": "experts", "method": "rtn"}),
    ],
)
def test_bytes_are_those_that_are_written(model_type, options, folder, tmp_path, monkeypatch):
    model = folder(model_type)
    with monkeypatch.context() as patch:
        patch.setattr(TensorFolder, "__getitem__", lambda *_: pytest.fail("a weight was read"))
        planned = untimed(model, **options)
    report = quantize(model, calibration=IDS, output=tmp_path / "out", **{"method": "gptq", **options})
    written = TensorFolder(tmp_path / "out")
    assert planned.bytes_after == sum(tensor.nbytes for tensor in written.values())
    assert planned.bytes_before == sum(tensor.nbytes for tensor in TensorFolder(model).values())
    assert sum(row.bytes for row in planned.rows) == planned.bytes_after
    assert (planned.format, planned.method) == (report.format, report.method)
    assert {name: planned.kept[name] for name in report.kept} == report.kept
    assert planned.is_loadable
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert file == planned.bytes_after + 8 + header
    loaded = load(tmp_path / "out")
    if "include" not in options and "lm_head" not in options.get("assignment", {}):
        assert planned.bpw_linear == pytest.approx(bpw_linear(loaded), rel=1e-12)
    assert planned.parameters == sum(p.numel() for p in qkern.load(model).parameters())
    held = {id(tensor): tensor.nbytes for tensor in loaded.state_dict(keep_vars=True).values()}
    assert any(isinstance(module, QuantModule) for module in loaded.modules())
    assert planned.loaded == sum(held.values())


def test_rows_are_kinds(folder):
    planned = untimed(folder("llama"), assignment=MIXED)
    found = {(row.kind, row.choice): (row.count, row.shape) for row in planned.rows}
    assert found["q_proj", "w2g32"] == (2, (64, 64))
    assert found["k_proj", "bfloat16"] == (2, (32, 64))
    assert found["down_proj", "w8"] == found["down_proj", "w3g32z"] == (1, (64, 96))
    assert found["lm_head", "w4g32"] == (1, (96, 64))
    assert found["embed_tokens", "bfloat16"] == (1, (96, 64))
    assert found["norms, biases", "bfloat16"] == (5 + 2 * 4, None)
    assert "no checkpoint format" in planned.kept["model.embed_tokens"]
    assert planned.scheme == "mixed"


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"type": "q4_k_m"}, "rtn"),
        ({"runtime": "gguf"}, "gptq"),
        ({"assignment": {"*.mlp.down_proj": "q2_k", "q_proj": "16", "model.embed_tokens": "q8_0"}}, "awq"),
        ({"type": "q8_0", "assignment": {"k_proj": "q3_k"}}, "rtn"),
    ],
)
def test_a_gguf_has_the_size_of_the_file(options, method, tmp_path):
    planned = untimed(SHIPPED, method=method, **options)
    calibration = None if method == "rtn" else torch.arange(128).reshape(2, 64)
    arguments = {name: value for name, value in options.items() if name != "runtime"}
    report = export_gguf(
        SHIPPED, tmp_path / "model.gguf", calibration=calibration, method=method, **arguments
    )
    assert planned.bytes_after == (tmp_path / "model.gguf").stat().st_size
    assert planned.bpw_file == report.bpw_file
    assert planned.format == planned.runtime == "gguf"
    counts = {}
    for row in planned.rows:
        counts[row.choice] = counts.get(row.choice, 0) + row.count
    assert counts == report.counts
    kept = {f"model.layers.{i}.self_attn.q_proj": "16-bit by the assignment" for i in range(4)}
    assert planned.kept == (kept if "16" in options.get("assignment", {}).values() else {})
    assert planned.is_loadable


def test_what_vllm_makes_one_must_be_alike(folder):
    model = folder("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    choices = {"q_proj": "w4g64", "*.layers.1.self_attn.k_proj": "w8", "*.mlp.*": "w4g64"}
    planned = untimed(model, assignment=choices, runtime="vllm")
    assert [problem for problem in planned.problems if "alike" in problem] == [
        "model.layers.0.self_attn and 1 more: runtime vllm makes one linear of these, which must be alike: "
        "got q_proj w4g64, k_proj 16, v_proj 16",
        "model.layers.1.self_attn: runtime vllm makes one linear of these, which must be alike: "
        "got q_proj w4g64, k_proj w8, v_proj 16",
    ]
    assert not planned.is_loadable
    assert untimed(model, assignment=choices, runtime="torch").problems == ()
    skipped = untimed(model, scheme="w4g64", skip=["gate_proj"], runtime="vllm")
    assert ["gate_proj 16, up_proj w4g64" in problem for problem in skipped.problems] == [True]
    assert untimed(model, scheme="w4g64", runtime="vllm").is_loadable


def test_what_cannot_be_loaded_or_written_is_listed(folder):
    model = folder("llama")
    problems = untimed(model, scheme="w4g32", runtime="vllm").problems
    why = "vLLM's kernels take multiples of 64 rows and 128 columns: got"
    assert problems == (
        f"model.layers.0.self_attn.q_proj and 3 more: {why} 64 x 64",
        f"model.layers.0.self_attn.k_proj and 3 more: {why} 32 x 64",
        f"model.layers.0.mlp.gate_proj and 3 more: {why} 96 x 64",
        f"model.layers.0.mlp.down_proj and 1 more: {why} 64 x 96",
    )
    (problem,) = untimed(model, scheme="w4g32", runtime="gguf").problems
    assert "and 13 more: runtime gguf takes GGUF types such as q4_k: got w4g32" in problem
    planned = untimed(SHIPPED, assignment={"q_proj": "q4_k"}, runtime="torch")
    assert any("runtime torch takes schemes such as w4g128: got q4_k" in line for line in planned.problems)
    planned = untimed(model, scheme="w4g40", format="awq")
    assert planned.format is None
    assert "groups that divide the input features: got K=64, group size 40" in planned.problems[0]
    assert planned.bytes_after > 0
    # GPTQ has short groups, and what it holds is loaded.
    assert untimed(folder("llama", intermediate_size=96), scheme="w4g64", format="gptq").is_loadable


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "w4", "assignment": MIXED}, InputError, "got scheme 'w4' too; leave one out"),
        ({"scheme": "w4", "type": "q4_0"}, InputError, r"scheme is for checkpoints, and a GGUF \(q4_0\)"),
        ({"skip": "o_proj", "include": "lm_head", "type": "q4_0"}, InputError, "skip, include are for"),
        ({"skip": "o_proj", "assignment": MIXED}, InputError, "leave skip and include out"),
        ({"assignment": {"mlp.up": "w4"}}, InputError, "'mlp.up' names no tensor"),
        ({"assignment": {"up_proj": "w4", "*.mlp.*": "w8"}}, InputError, "up_proj twice"),
        ({"assignment": {"mlp.up": "q4_0"}}, InputError, "'mlp.up' names no tensor"),
        ({"assignment": {"up_proj": "w4"}, "type": "q4_0"}, UnsupportedError, "which GGUF does not hold"),
        ({"runtime": "exl3"}, InputError, "unknown runtime 'exl3'"),
        ({"method": "obq"}, InputError, "unknown method 'obq'"),
        ({"method": "obq", "type": "q4_0"}, InputError, "unknown method 'obq'"),
        ({"scheme": "w4g64d"}, UnsupportedError, "with plain scales: got w4g64d"),
        ({"type": "q4_0", "method": "smoothquant"}, InputError, "unknown method 'smoothquant'"),
        ({"type": "iq4_xs", "method": "gptq"}, UnsupportedError, "GPTQ encodes"),
        ({"type": "f16", "method": "gptq"}, InputError, "no linear gets any"),
        ({"output": SHIPPED}, InputError, "must not be the same"),
        ({"output": SHIPPED / "config.json", "type": "q4_0"}, InputError, r"must end in \.gguf"),
        ({"length": 1}, InputError, "length must be at least 2"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        untimed(SHIPPED, **options)


def test_a_model_must_be_here(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        untimed(tmp_path / "missing")
    import huggingface_hub

    def offline(name, local_files_only=False, **_):
        assert local_files_only
        if name == "somebody/model":
            return str(SHIPPED)
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for options in ({}, {"type": "q4_0"}):
        with pytest.raises(InputError, match=r"nobody/x .* on this disk: fetch it first"):
            untimed("nobody/x", **options)
        assert untimed("somebody/model", **options).parameters == untimed(SHIPPED).parameters


def test_a_model_in_memory(tiny):
    model = tiny("qwen2")
    planned = untimed(model, scheme="w4g32")
    assert planned.bytes_before == sum(p.nbytes for p in model.parameters())
    with pytest.raises(InputError, match="a GGUF is made from a folder or hub id: got Qwen2ForCausalLM"):
        untimed(model, type="q8_0")


def test_names_that_transformers_converts(folder, tmp_path, monkeypatch):
    model = folder("llama")
    changed = tmp_path / "older"
    shutil.copytree(model, changed)
    from qkern.pipelines import source

    bind = source.bind_names
    monkeypatch.setattr(source, "bind_names", lambda *given: (bind(*given)[0], ["some.weight"]))
    planned, plain = untimed(changed, scheme="w4g32"), quantize(changed, method="rtn", scheme="w4g32")
    assert plain.qkern_report.bpw_linear == planned.bpw_linear
    monkeypatch.undo()
    direct = untimed(model, scheme="w4g32")
    assert planned.bytes_after == direct.bytes_after
    assert planned.memory == direct.memory + planned.bytes_before  # it is loaded whole


def test_disk_counts_finished_layers_and_the_shard_that_is_written_twice(folder, tmp_path, monkeypatch):
    model = folder("llama")
    planned = untimed(model, scheme="w4g32")
    codes = sum(row.bytes for row in planned.rows if row.choice == "w4g32")
    # GPTQ's files have zero points and a group index beside what a layer has.
    assert planned.disk < codes + 2 * planned.bytes_after < 1.2 * planned.disk
    small = untimed(model, scheme="w4g32", max_shard_size="10KB")
    assert small.disk == planned.disk - planned.bytes_after + 10_000
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000 * (path == tmp_path)))
    (warning,) = untimed(model, output=tmp_path / "a" / "b").warnings
    assert "of disk, and 0.00 GB are free" in warning


def test_memory_that_is_not_there_is_said(monkeypatch):
    # The verb hides its module.
    monkeypatch.setattr(sys.modules["qkern.pipelines.plan"], "available_bytes", lambda: 10_000_000)
    planned = plan(SHIPPED, method="gptq")
    assert planned.seconds is None
    assert planned.basis == "not estimated: the run does not fit in memory"
    (warning,) = planned.warnings
    assert "of memory at its peak, and 0.01 GB are free" in warning
    assert plan(SHIPPED, method="gptq", samples=1, length=64).seconds > 0


# Peak of the memory that is the process's own, after a small run: the pages of a mapped file are the file's.
SCRIPT = """
import gc, json, sys, threading, time
import torch
from qkern.pipelines import quantize

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def peak(method):
    quantize(warm, method=method, scheme="w4g32", calibration=ids[:2], output=f"{folder}/{method}-warm")
    gc.collect()
    most, done, before = 0, threading.Event(), own()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, own())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    quantize(model, method=method, scheme="w4g32", calibration=ids, output=f"{folder}/{method}")
    done.set()
    watcher.join()
    return most - before

warm, model, folder, *methods = sys.argv[1:]
ids = torch.arange(64 * 64).reshape(64, 64) % 96
torch.set_num_threads(1)
print(json.dumps([peak(method) for method in methods]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
def test_memory_is_what_a_run_takes(folder, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 2}
    warm, model = folder("llama"), folder("llama", **sizes)
    methods = ("rtn", "gptq", "awq")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(warm), str(model), str(tmp_path), *methods],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for method, measured in zip(methods, json.loads(result.stdout), strict=True):
        planned = untimed(model, method=method, scheme="w4g32", samples=64, length=64).memory
        assert measured / 1.5 < planned < 1.5 * measured, method


def job_of(model, method, **options):
    from qkern.models import describe
    from qkern.nn import named_linears
    from qkern.pipelines.checks import checked_settings

    return estimates.Job(
        model=model,
        structure=describe(model),
        method=method,
        linears={name: "w4g32" for name in named_linears(model) if name != "lm_head"},
        settings=checked_settings(method, "w4g32"),
        **options,
    )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_time_grows_with_the_tokens_of_a_layer(tiny, monkeypatch, method):
    clock = [0.0]
    passes = estimates._passes

    def slow(job, stream, index, names):
        passes(job, stream, index, names)
        clock[0] += 0.5 + 1e-3 * sum(state.shape[0] * state.shape[1] for state in stream.states)

    monkeypatch.setattr(estimates, "_passes", slow)
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: clock[0])
    job = job_of(tiny("llama", num_hidden_layers=3), method, samples=1000, length=64)
    # Matrices take no time on this clock.
    assert estimates.run_seconds(job, torch.device("cpu")) == pytest.approx(3 * (0.5 + 64))


def test_time_of_large_matrices_follows_the_operations(tiny, monkeypatch):
    def law(job, spelling, N, K, device):
        assert N <= 64
        assert K <= 32
        return 2e-6 * N * K + 3e-9 * K * K * (N + K / 20)

    monkeypatch.setattr(estimates, "_sample", law)
    monkeypatch.setattr(estimates, "_ROWS", 64)
    monkeypatch.setattr(estimates, "_COLUMNS", 32)
    job = job_of(tiny("llama"), "gptq", samples=1, length=8)
    for N, K in ((64, 32), (1024, 32), (512, 4096), (32, 64)):
        expected = 2e-6 * N * K + 3e-9 * K * K * (N + K / 20)
        if K == 32 and N > 64:
            expected = law(job, "", 64, 32, None) * N / 64
        found = estimates._matrix_seconds(job, "w4g32", N, K, torch.device("cpu"))
        assert found == pytest.approx(expected, rel=1e-6)


def test_an_estimate_is_of_the_right_size():
    # Within two on a quiet machine; a busy one may be several times slower in one of the two.
    options = {"method": "gptq", "scheme": "w4g128", "samples": 4, "length": 512}
    planned = plan(SHIPPED, **options)
    report = quantize(SHIPPED, calibration=SHIPPED / "calibration.txt", **options).qkern_report
    assert report.seconds / 5 < planned.seconds < 5 * report.seconds


@pytest.mark.parametrize("kind", ["q4_k_m", None])
def test_every_way_is_timed(kind):
    for method in ("rtn", "gptq", "awq"):
        planned = plan(SHIPPED, type=kind, method=method, samples=1, length=64)
        assert 0 < planned.seconds < 60
        assert planned.basis.startswith("estimate from")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return end.value.code, output.out, output.err


def test_the_command(capsys, tmp_path, folder):
    model = folder("llama")
    path = MixedPrecision(MIXED).write(tmp_path / "assignment.json")
    code, out, err = run(capsys, "plan", model, "--assignment", path, "--json", "--no-time")
    assert code == 0, err
    assert json.loads(out) == json.loads(json.dumps(untimed(model, assignment=path).to_dict())) | {
        name: json.loads(out)[name] for name in ("memory_free", "disk_free")
    }
    code, out, err = run(capsys, "plan", model, "--scheme", "w4g32", "--runtime", "vllm", "--no-time")
    assert code == 1
    assert "problem      model.layers.0.self_attn.q_proj and 3 more: vLLM's kernels" in out
    assert "kept         lm_head: output head" in out
    code, out, err = run(capsys, "plan", SHIPPED, "--type", "q4_k_m", "--samples", 1, "--length", 64)
    assert (code, "problem" in out) == (0, False)
    assert max(map(len, out.splitlines())) <= 100
    assert "estimate from samples" in out
    code, out, err = run(capsys, "plan", model, "--scheme", "w4", "--assignment", path)
    assert (code, out) == (1, "")
    assert "leave one out" in err.splitlines()[-1]
    assert run(capsys, "plan", model, "--method", "obq")[0] == 2
