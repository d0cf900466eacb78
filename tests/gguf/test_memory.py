"""Exporting streams: memory is bounded by the largest tensor, not by the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Peak of the memory that is the process's own; the pages of a mapped checkpoint are the file's.
SCRIPT = """
import gc, sys, threading, time
from qkern.pipelines import export_gguf

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

warm, model, kind, output = sys.argv[1:]
export_gguf(warm, output + ".warm", kind)
gc.collect()
peak, done, before = 0, threading.Event(), own()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
export_gguf(model, output, kind)
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_peak_memory_is_three_times_the_largest_tensor(kind, model_type, model_folder, tmp_path):
    # The experts of a layer are one tensor of the file.
    inner = 8192 if model_type == "llama" else 2048
    sizes = {"hidden_size": 512, "intermediate_size": inner, "num_hidden_layers": 4}
    folder, model = model_folder(model_type, **sizes)
    model.bfloat16().save_pretrained(folder)
    largest = 8192 * 512 * 4
    stored = sum(parameter.numel() for parameter in model.parameters()) * 2
    assert stored > 5 * largest
    warm, _ = model_folder(model_type)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(warm), str(folder), kind, str(tmp_path / "model.gguf")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) <= 3 * largest
