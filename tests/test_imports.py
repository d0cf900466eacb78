"""What `import qkern` costs and drags in, each time in a fresh process."""

import json
import subprocess
import sys

import pytest

import qkern

HEAVY = ("transformers", "gguf", "typer", "rich", "matplotlib", "pymoo", "llama_cpp", "datasets", "triton")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def loaded_after(statement: str) -> set[str]:
    listing = "import json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    return set(json.loads(run(f"import sys\n{statement}\n{listing}")))


def test_import_is_light():
    # Torch itself may load some of them (triton, where it is installed): only what qkern adds counts.
    added = loaded_after("import qkern") - loaded_after("import torch")
    assert "qkern" in added
    assert not added & set(HEAVY)


def test_import_costs_under_300_ms_beyond_torch():
    code = "import torch, time; t = time.perf_counter(); import qkern; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_nn_and_ops_load_no_transformers():
    added = loaded_after("import qkern.ops, qkern.nn, qkern.evaluation") - loaded_after("import torch")
    assert not added & {"transformers", "gguf", "typer", "matplotlib", "pymoo", "llama_cpp", "datasets"}


def test_command_line_help_loads_no_transformers():
    added = loaded_after("import qkern.cli") - loaded_after("import torch")
    assert not added & {"transformers", "gguf", "matplotlib", "pymoo", "llama_cpp", "datasets"}


@pytest.mark.parametrize("name", qkern.__all__)
def test_public_name_is_reachable(name):
    assert getattr(qkern, name) is not None
    assert name in dir(qkern)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qkern.nonsense
