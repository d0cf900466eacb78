"""Fixtures that every area shares: CPU tiers, backends, hypothesis profiles, small models.

A test that takes ``cpu_tier`` runs once for each CPU tier this machine can run, with that tier forced; one
that takes ``backend`` runs once for the reference and once for each such tier, and passes the fixture's value
to the op. A test module that sets ``OP = "<folder of csrc/kernels>"`` runs only the tiers for which that op
has a kernel of its own: the others would repeat them. Where that folder has CUDA sources, ``backend`` runs
them too, compiled for the CPU (csrc/include/qkern/cuda/emulator.h), and on the GPU if there is one.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pybind11
import pytest
import torch
from hypothesis import HealthCheck, settings

from qkern.ops import _cuda, _native, registry
from qkern.ops.dequant_matmul import cuda as matmul_cuda
from qkern.ops.int8_matmul import cuda as int8_cuda
from qkern.schemes import PackedWeight, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"

# The forced tier of a fixture stays for all examples of a test, which is what is wanted.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, **_COMMON)
settings.register_profile("dev", max_examples=300, **_COMMON)
settings.load_profile("ci")  # --hypothesis-profile=dev searches longer and at random


def tiers_of(op: str | None) -> list[str]:
    """Usable CPU tiers, or those of them with a kernel file of `op`."""
    usable = list(_native.usable_tiers())
    return usable if op is None else [tier for tier in usable if (KERNELS / op / f"{tier}.cpp").exists()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tiers = tiers_of(getattr(metafunc.module, "OP", None))
    if "cpu_tier" in metafunc.fixturenames:
        metafunc.parametrize("cpu_tier", tiers, indirect=True)
    if "backend" in metafunc.fixturenames:
        names = ["reference", *(f"cpu-{tier}" for tier in tiers)]
        if any((KERNELS / getattr(metafunc.module, "OP", "")).glob("*.cu")):
            names += ["cuda-emulated", *(["cuda-gpu"] if torch.cuda.is_available() else [])]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def cpu_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a CPU tier, which is the active one during the test."""
    with _native.force_tier(request.param):
        yield request.param


@pytest.fixture(scope="session")
def cuda_emulator(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module `_cuda`, its kernels compiled for the CPU."""
    csrc = KERNELS.parent
    path = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    sources = [*csrc.glob("core/*.cu"), *csrc.glob("kernels/*/*.cu"), *csrc.glob("bindings/cuda/*.cpp")]
    define = ('-DQKERN_VERSION="emulated"', '-DQKERN_CUDA_ARCHITECTURES="emulated"', "-DQKERN_CUDA_EMULATED")
    include = (f"-I{csrc / 'include'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    flags = (
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-fPIC",
        "-fvisibility=hidden",
    )
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def compiled(source: Path) -> Path:
        to = path.with_name(f"{source.parent.name}-{source.stem}.o")
        command = [*compiler, *flags, *define, *include, "-x", "c++", "-c", str(source), "-o", str(to)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*compiler, "-shared", "-o", str(path), *map(str, objects)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.EMULATED
    return module


@pytest.fixture
def emulator(cuda_emulator: ModuleType) -> Iterator[ModuleType]:
    """The module `_cuda`, emulated, in the place of the real one during the test."""
    with _cuda.emulated(cuda_emulator):
        yield cuda_emulator
    cuda_emulator.set_seed(0)
    cuda_emulator.set_small(False)


def moved(values: Any, device: str) -> Any:
    """The same values with every tensor in them on `device`."""
    if isinstance(values, (torch.Tensor, QuantizedWeight)):
        return values.to(device)
    if isinstance(values, PackedWeight):
        return replace(values, blob=values.blob.to(device))
    if isinstance(values, (tuple, list)):
        return type(values)(moved(value, device) for value in values)
    return values


def run_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA backend take tensors on the CPU: they go to the GPU and the results come back."""

    def there_and_back(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            on_gpu = {name: moved(value, "cuda") for name, value in named.items()}
            return moved(function(*moved(arguments, "cuda"), **on_gpu), "cpu")

        return call

    for key, known in list(registry._IMPLEMENTATIONS.items()):
        if known.backend == registry.Backend.CUDA:
            proxy = replace(known, call=there_and_back(known.call), why_not=lambda request: None)
            monkeypatch.setitem(registry._IMPLEMENTATIONS, key, proxy)
    for owner, name in ((matmul_cuda, "matmul"), (matmul_cuda, "input_gradient"), (int8_cuda, "matmul")):
        monkeypatch.setattr(owner, name, there_and_back(getattr(owner, name)))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Value for an op's ``backend=``; for ``"cpu"``, each usable tier in turn is the active one."""
    name, _, tier = request.param.partition("-")
    if not tier:
        yield name
    elif tier == "gpu":
        run_on_gpu(request.getfixturevalue("monkeypatch"))
        yield name
    elif name == "cuda":
        with _cuda.emulated(request.getfixturevalue("cuda_emulator")):
            yield name
    else:
        with _native.force_tier(tier):
            yield name


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Everything that only some architectures have is switched on: biases, tied heads, sliding windows.
EXTRA = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}


def make_tiny(model_type, *, seed=0, dtype=torch.float32, **overrides):
    """A small causal LM with random weights, none of them at the value it is initialized to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **EXTRA.get(model_type, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.08
            parameter.add_(torch.randn_like(parameter) * spread)
            # Not model.to(dtype): that would round the rotary frequencies, which no file holds.
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="session")
def tiny():
    """Maker of small causal LMs: ``tiny("llama", num_hidden_layers=1)``."""
    return make_tiny
