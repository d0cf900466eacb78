"""What `import qkern` costs and drags in, each time in a fresh process."""

import json
import subprocess
import sys

import pytest

import qkern

HEAVY = {"transformers", "gguf", "matplotlib", "pymoo", "llama_cpp", "datasets", "triton"}
STAGES = ("qkern", "qkern.ops, qkern.nn, qkern.evaluation", "qkern.cli")
# Torch itself may load some of them (torch._dynamo, which qkern.nn needs, loads triton): only what qkern adds
# counts. That qkern.ops adds no triton is tested in tests/ops/test_triton.py.
PROGRAM = """
import json, sys, time
import torch
known, facts = set(sys.modules), []
for stage in STAGES:
    start = time.perf_counter()
    exec(f"import {stage}")
    seconds = time.perf_counter() - start
    added = {m.split(".")[0] for m in set(sys.modules) - known}
    by_torch = {"triton"} if "torch._dynamo" in sys.modules else set()
    facts.append({"seconds": seconds, "added": sorted(added - by_torch)})
print(json.dumps(facts))
"""


def measure(stages):
    program = PROGRAM.replace("STAGES", repr(stages))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def facts():
    return measure(STAGES)


def test_import_loads_nothing_heavy(facts):
    added = set(facts[0]["added"])
    assert "qkern" in added
    assert not added & (HEAVY | {"typer", "rich"})


def test_kernels_and_evaluation_load_nothing_heavy(facts):
    assert not set(facts[1]["added"]) & (HEAVY | {"typer"})


def test_command_line_loads_nothing_heavy(facts):
    assert not set(facts[2]["added"]) & HEAVY


def test_import_costs_under_300_ms_beyond_torch(facts):
    # The best of three: a busy machine may slow one down.
    seconds = facts[0]["seconds"]
    for _ in range(2):
        if seconds >= 0.3:
            seconds = measure(STAGES[:1])[0]["seconds"]
    assert seconds < 0.3


@pytest.mark.parametrize("name", qkern.__all__)
def test_public_name_is_reachable(name):
    assert getattr(qkern, name) is not None
    assert name in dir(qkern)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qkern.nonsense
