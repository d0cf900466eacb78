"""Time and memory of writing a 7B-shaped model as GGUF, beside llama.cpp's quantizer.

    python bench/export_gguf.py [--layers 4] [--type q4_k_m] [--rounds 3]

The model has the layers of Qwen2.5-7B (hidden 3584, inner 18944, 28 heads, 4 of them for keys and values)
with random weights made on the spot, `--layers` of them, bf16, and a small vocabulary. qkern reads the
folder and writes the mixture; llama.cpp's ``llama_model_quantize`` reads a BF16 export of it and writes the
same. Both run in processes of their own, taking turns; memory is the most that a process had resident,
which for both counts pages of mapped files. The whole model is extrapolated by its number of weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import qkern

TOKENIZER = Path(qkern.__file__).parent / "demo" / "data" / "bible"
HIDDEN, INNER, HEADS, KEYS, LAYERS, VOCABULARY = 3584, 18944, 28, 4, 28, 152064
# What each process runs: argv is the source, the target, the type.
OURS = """
import json, resource, sys, time
from qkern.pipelines.export_gguf import export_gguf
started = time.monotonic()
export_gguf(*sys.argv[1:4])
seconds = time.monotonic() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
THEIRS = """
import json, os, resource, sys, time
import llama_cpp
from llama_cpp._logger import set_verbose
set_verbose(False)
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
parameters.nthread = len(os.sched_getaffinity(0))
started = time.monotonic()
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters) == 0
seconds = time.monotonic() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def make(folder: Path, layers: int) -> int:
    """Write the model, a file a layer; returns the weights of its layers."""
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    keys = HIDDEN // HEADS * KEYS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    files = [
        {
            "model.embed_tokens.weight": weights(config["vocab_size"], HIDDEN),
            "model.norm.weight": weights(HIDDEN),
        }
    ]
    index: dict[str, str] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        file = {f"{prefix}{name}.weight": weights(*shape) for name, shape in shapes.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            file[f"{prefix}self_attn.{name}.bias"] = weights(shapes[f"self_attn.{name}"][0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            file[f"{prefix}{name}.weight"] = weights(HIDDEN)
        files.append(file)
        save(folder, len(files) - 1, files[-1], index)
        files[-1] = {}
    save(folder, 0, files[0], index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return layers * sum(rows * columns for rows, columns in shapes.values())


def save(folder: Path, number: int, tensors: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    name = f"model-{number:05}.safetensors"
    save_file(tensors, folder / name)
    index |= dict.fromkeys(tensors, name)


def run(script: str, *arguments: object) -> tuple[float, float]:
    """Seconds, and the most gigabytes that were resident."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    seconds, kilobytes = json.loads(done.stdout.strip().splitlines()[-1])
    return float(seconds), kilobytes * 1024 / 1e9


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files go meanwhile (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        layers = make(folder / "model", arguments.layers)
        run(OURS, folder / "model", folder / "bf16.gguf", "bf16")
        found: dict[str, list[Any]] = {"qkern": [], "llama.cpp": []}
        for _ in range(arguments.rounds):
            for maker, script, source in (
                ("qkern", OURS, folder / "model"),
                ("llama.cpp", THEIRS, folder / "bf16.gguf"),
            ):
                target = folder / "out.gguf"
                found[maker].append(run(script, source, target, arguments.type))
                target.unlink()
    per_layer = layers // arguments.layers
    whole = LAYERS * per_layer + 2 * VOCABULARY * HIDDEN
    threads = torch.get_num_threads()
    print(f"{arguments.type}, {arguments.layers} layers, {layers / 1e9:.2f} G weights, {threads} threads")
    print("| made by | seconds | peak GB | whole model, seconds (extrapolated) |\n|---|---|---|---|")
    for maker, runs in found.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        memory = max(memory for _, memory in runs)
        print(f"| {maker} | {seconds:.1f} | {memory:.2f} | {seconds * whole / layers:.0f} |")


if __name__ == "__main__":
    main()
