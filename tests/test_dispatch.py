"""CPU tiers and the registry: what is compiled, what is forced, what a backend answers when it cannot run."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkern import _core
from qkern.errors import InputError, NativeError, UnsupportedError
from qkern.ops import _native, dequantize_groupwise, quantize_groupwise, registry
from qkern.ops.registry import Backend, Implementation, Request
from qkern.schemes import Scheme

ROOT = Path(__file__).parents[1]
CPU = Request(device=torch.device("cpu"), scheme=Scheme.parse("w4g128"), dtype=torch.float32)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tiers_are_those_of_the_table() -> None:
    table = (ROOT / "csrc" / "cmake" / "isa.cmake").read_text(encoding="utf-8")
    named = {name for line in re.findall(r"set\(QKERN_TIERS ([^)]*)\)", table) for name in line.split()}
    compiled, usable = _core.compiled_tiers(), _core.usable_tiers()
    assert compiled[0] == usable[0] == "scalar"
    assert set(usable) <= set(compiled) <= named
    assert _core.active_tier() in usable


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's list of CPU features is Linux's")
def test_tiers_agree_with_the_kernel_on_what_the_cpu_has() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    usable = _core.usable_tiers()
    for tier, needs in (
        ("avx2", {"avx2", "fma", "f16c", "bmi2"}),
        ("avx512", {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    ):
        if tier in _core.compiled_tiers():
            assert (tier in usable) == (needs <= flags)
    names = {name.replace("avx512vnni", "avx512_vnni") for name in _core.cpu_features().split()}
    assert {"avx2", "fma", "f16c", "avx512f", "avx512_vnni"} & names <= flags


def test_force_tier_restores_the_tier_even_after_an_error(cpu_tier: str) -> None:
    assert _core.active_tier() == cpu_tier
    inside = None

    def fail() -> None:
        nonlocal inside
        with _native.force_tier("scalar"):
            inside = _core.active_tier()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert inside == "scalar"
    assert _core.active_tier() == cpu_tier


@pytest.mark.parametrize("name", ["sse9", "", "neon" if "avx2" in _core.usable_tiers() else "avx2"])
def test_force_tier_refuses_a_tier_that_cannot_run(name: str) -> None:
    before = _core.active_tier()
    with pytest.raises(InputError, match="usable are"), _native.force_tier(name):
        pass
    assert _core.active_tier() == before


def test_environment_forces_a_tier() -> None:
    code = "from qkern.ops import _native; print(_native.core().active_tier())"
    assert run_python(code, QKERN_CPU_TIER="scalar").stdout.strip() == "scalar"
    refused = run_python(code, QKERN_CPU_TIER="sse9")
    assert refused.returncode != 0
    assert "QKERN_CPU_TIER=sse9 cannot run here: usable tiers are scalar" in refused.stderr


def test_a_module_that_does_not_load_is_explained() -> None:
    code = """
import sys, torch
sys.modules["qkern._core"] = None  # what an import error looks like
from qkern.ops import _native, quantize_groupwise
weight = torch.ones(2, 32)
print(quantize_groupwise(weight, "w4").scales.shape)
for backend in ("cpu",):
    try:
        quantize_groupwise(weight, "w4", backend=backend)
    except Exception as error:
        print(type(error).__name__, error)
try:
    _native.core()
except Exception as error:
    print(type(error).__name__)
"""
    lines = run_python(code).stdout.splitlines()
    assert lines[0] == "torch.Size([2, 1])"  # auto falls back to the reference
    assert lines[1].startswith(
        "UnsupportedError backend cpu cannot run quantize_groupwise: the native module"
    )
    assert lines[2] == NativeError.__name__


def test_a_named_backend_that_cannot_run_says_why() -> None:
    weight = torch.ones(2, 32)
    with pytest.raises(UnsupportedError, match="the tensors are on cpu, not on a CUDA device"):
        quantize_groupwise(weight, "w4", backend="triton")
    with pytest.raises(InputError, match="allowed are auto, reference, cpu, cuda, triton"):
        quantize_groupwise(weight, "w4", backend="fast")
    meta = torch.ones(2, 32, device="meta")
    with pytest.raises(UnsupportedError, match="the tensors are on meta, not on the CPU"):
        quantize_groupwise(meta, "w4", backend="cpu")


def test_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    op = "an_op_of_this_test"
    reason = "it cannot today"
    reference = Implementation(
        op=op, backend=Backend.REFERENCE, call=lambda: "reference", why_not=lambda r: None
    )
    native = Implementation(op=op, backend=Backend.CPU, call=lambda: "cpu", why_not=lambda r: reason)
    try:
        registry.register(native)
        registry.register(reference)
        with caplog.at_level(logging.INFO, logger="qkern"):
            for _ in range(3):
                assert registry.select(op, "auto", CPU).call() == "reference"
        assert [record.message for record in caplog.records] == [
            f"{op} does not use its cpu kernels: {reason}"
        ]
        with pytest.raises(UnsupportedError, match=reason):
            registry.select(op, "cpu", CPU)
        registry._IMPLEMENTATIONS.pop((op, Backend.REFERENCE))
        with pytest.raises(UnsupportedError, match="no backend can run"):
            registry.select(op, "auto", CPU)
    finally:
        registry._IMPLEMENTATIONS.pop((op, Backend.REFERENCE), None)
        registry._IMPLEMENTATIONS.pop((op, Backend.CPU), None)
        registry._FALLBACKS_LOGGED.discard((op, reason))


def test_matrix_lists_every_op_for_every_scheme() -> None:
    rows = registry.matrix(
        torch.device("cpu"), [Scheme.parse("w4g128"), Scheme.parse("nf4g64")], torch.float32
    )
    for op in ("quantize_groupwise", "dequantize_groupwise", "pack_bits", "unpack_bits", "gptq_update"):
        for backend in ("reference", "cpu"):
            reasons = [row["reason"] for row in rows if row["op"] == op and row["backend"] == backend]
            assert reasons == [None, None], (op, backend)


def test_every_registered_op_has_a_test_file() -> None:
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    folders = {
        path.parent.name
        for path in (ROOT / "python" / "qkern" / "ops").glob("*/__init__.py")
        if path.parent.name
    }
    assert folders <= tests, f"ops without a test file: {sorted(folders - tests)}"


def test_kernels_compute_the_same_on_a_call_after_a_tier_change() -> None:
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    results = []
    for tier in _native.usable_tiers():
        with _native.force_tier(tier):
            results.append(
                dequantize_groupwise(quantize_groupwise(weight, "w4g32", backend="cpu"), backend="cpu")
            )
    assert all(torch.equal(result, results[0]) for result in results)
