"""Exporting streams: memory is bounded by the largest tensor (where layers run, a layer), not the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.checkpoints import CheckpointWriter
from qkern.ops import quantize_groupwise
from qkern.schemes import Scheme

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")

# Peak of the memory that is the process's own; the pages of a mapped checkpoint are the file's.
SCRIPT = """
import gc, json, sys, threading, time
import torch
from qkern.pipelines import export_gguf, imatrix

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def run(model, output, options):
    if "type" in options:
        export_gguf(model, output, **options)
    else:
        imatrix(model, calibration=torch.arange(32).reshape(2, 16), output=output)

warm, model, folder, options = sys.argv[1:]
options = json.loads(options)
run(warm, folder + "/warm.gguf", {name: value for name, value in options.items() if name != "imatrix"})
gc.collect()
peak, done, before = 0, threading.Event(), own()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
run(model, folder + "/model.gguf", options)
done.set()
watcher.join()
print(peak - before)
"""
LARGEST = 8192 * 512 * 4
# The experts of a layer are one tensor of the file.
INNER = {"llama": 8192, "mixtral": 2048}


def peak(warm, model, folder, **options):
    """Most memory that an export takes, or without a type an importance matrix."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(warm), str(model), str(folder), json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folders(model_folder):
    """Maker of folders of a model to warm up with and of a large one, and the large model."""
    made = {}

    def make(model_type):
        if model_type not in made:
            sizes = {"hidden_size": 512, "intermediate_size": INNER[model_type], "num_hidden_layers": 4}
            folder, model = model_folder(model_type, **sizes)
            model.bfloat16().save_pretrained(folder)
            stored = sum(parameter.numel() for parameter in model.parameters()) * 2
            assert stored > 5 * LARGEST
            made[model_type] = model_folder(model_type)[0], folder, model
        return made[model_type]

    return make


@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
@pytest.mark.parametrize("model_type", INNER)
def test_peak_memory_is_three_times_the_largest_tensor(kind, model_type, folders, tmp_path):
    warm, folder, _ = folders(model_type)
    assert peak(warm, folder, tmp_path, type=kind) <= 3 * LARGEST


@pytest.mark.slow
def test_files_of_a_size_cost_no_more(folders, tmp_path):
    warm, folder, _ = folders("mixtral")
    assert peak(warm, folder, tmp_path, type="f32", max_shard_size="40MB") <= 3 * LARGEST
    assert len(list(tmp_path.glob("model-*.gguf"))) > 3


def test_an_importance_matrix_costs_no_more(folders, tmp_path):
    warm, folder, _ = folders("mixtral")
    matrix = tmp_path / "matrix.gguf"
    qkern.imatrix(folder, calibration=torch.arange(32)[None], output=matrix)
    assert peak(warm, folder, tmp_path, type="q4_k_m", imatrix=str(matrix)) <= 3 * LARGEST


def test_experts_in_one_parameter_cost_no_more(folders, tmp_path):
    warm, _, model = folders("mixtral")
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    for file in folders("mixtral")[1].glob("*.json"):
        (fused / file.name).write_bytes(file.read_bytes())
    assert peak(warm, fused, tmp_path, type="q4_k_m") <= 3 * LARGEST


def quantized(folder, output, config):
    with CheckpointWriter(output, format="compressed-tensors") as writer:
        for name, tensor in load_file(folder / "model.safetensors").items():
            if "_proj" in name or ".experts." in name:
                weight = quantize_groupwise(tensor.float(), Scheme.parse("w4g32"))
                writer.add_quantized(name.removesuffix(".weight"), weight)
            else:
                writer.add_tensor(name, tensor)
        writer.finish(config, tokenizer_from=folder)
    return output


@pytest.mark.parametrize("kind", ["q4_0", pytest.param("q4_k_m", marks=pytest.mark.slow)])
def test_a_quantized_checkpoint_costs_no_more(kind, folders, tmp_path):
    warm, folder, model = folders("mixtral")
    made = quantized(folder, tmp_path / "quantized", model.config)
    assert peak(warm, made, tmp_path, type=kind) <= 3 * LARGEST


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"])
def test_activations_need_a_layer_at_a_time(model_type, folders, tmp_path):
    warm, folder, model = folders(model_type)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert peak(warm, folder, tmp_path) <= 1.5 * layer
