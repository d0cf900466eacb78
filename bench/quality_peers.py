"""Other quantizers for `bench/quality.py`, each in a process and, if need be, an environment of its own.

    python bench/quality_peers.py gptqmodel INPUT OUTPUT --model FOLDER --scheme w4g128 [--method awq]
    python bench/quality_peers.py gptqmodel-layers INPUT OUTPUT --scheme w4g128
    python bench/quality_peers.py ggml INPUT OUTPUT --type q4_K
    python bench/quality_peers.py llama-quantize INPUT OUTPUT --model F32.gguf --type q4_k_m --file NEW.gguf

INPUT and OUTPUT are safetensors files. OUTPUT holds the weights that the peer's result stands for, decoded
here and not by qkern, and in its metadata the seconds the peer took, its version and its bits per weight.

- ``gptqmodel``: INPUT has `ids` (the calibration tokens, ``[S, T]``). Quantizes a model folder with
  GPTQModel's defaults for the scheme. GPTQModel refuses to start on two cores: it gives the CPU one worker
  and its own model loader asks for two. ``GPTQMODEL_CPU_WORKERS=2``, its own environment variable, is set
  here; nothing of it is patched. A virtual environment that sees another's torch through a .pth file is
  enough for it: ``--gptqmodel-python`` of quality.py names its interpreter.
- ``gptqmodel-layers``: INPUT has `<layer>.weight` ``[N, K]`` and `<layer>.inputs` ``[T, K]``.
- ``ggml``: INPUT has `<layer>.weight` and, optionally, `<layer>.importance` ``[K]``. Calls
  ``ggml_quantize_chunk`` of the library inside llama-cpp-python, which is what llama.cpp's llama-quantize
  calls for each tensor, with the importance as its imatrix; decoded by the gguf package.
- ``llama-quantize``: INPUT has an importance ``[K]`` for each tensor of the file, or nothing of its names.
  Calls ``llama_model_quantize`` on a whole file; OUTPUT has the metadata alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Places of the eight columns of an AWQ word, by nibble.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def stream_fields(words: np.ndarray, bits: int) -> np.ndarray:
    """``[n, words]`` little-endian bit streams to ``[n, words * 32 / bits]`` fields."""
    raw = (words.view(np.uint32)[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    fields = raw.reshape(len(words), -1, bits)
    return (fields << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.int64)


def decode_gptq(entry: Mapping[str, Tensor], bits: int, first_version: bool) -> Tensor:
    """GPTQ file tensors of one linear to ``[N, K]``."""
    codes = stream_fields(np.ascontiguousarray(entry["qweight"].numpy().T), bits)
    zeros = stream_fields(np.ascontiguousarray(entry["qzeros"].numpy()), bits)
    if first_version:
        zeros = (zeros + 1) % 2**bits
    group = entry["g_idx"].numpy()
    scales = entry["scales"].float().numpy()
    return torch.from_numpy(((codes - zeros[group].T) * scales[group].T).astype(np.float32))


def decode_awq(entry: Mapping[str, Tensor], group_size: int) -> Tensor:
    """AWQ GEMM file tensors of one linear to ``[N, K]``."""

    def fields(words: Tensor) -> np.ndarray:
        nibbles = stream_fields(np.ascontiguousarray(words.numpy()), 4).reshape(len(words), -1, 8)
        columns = np.empty_like(nibbles)
        columns[..., AWQ_ORDER] = nibbles
        return columns.reshape(len(words), -1)

    codes, zeros = fields(entry["qweight"]), fields(entry["qzeros"])
    group = np.arange(len(codes)) // group_size
    weight = (codes - zeros[group]) * entry["scales"].float().numpy()[group]
    return torch.from_numpy(weight.T.astype(np.float32))


def decode_folder(folder: Path) -> tuple[dict[str, Tensor], float]:
    """All tensors of a quantized checkpoint as floats, and the bits per weight of its linears."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    result: dict[str, Tensor] = {}
    stored = weights = 0
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        entry = {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
        # g_idx counts repetitions of i // group_size and is left out, as other formats do.
        stored += sum(8 * tensor.nbytes for part, tensor in entry.items() if part != "g_idx")
        if config["quant_method"] == "awq":
            weight = decode_awq(entry, config["group_size"])
        else:
            first_version = config.get("checkpoint_format", "gptq") == "gptq"
            weight = decode_gptq(entry, config["bits"], first_version)
        weights += weight.numel()
        result[f"{name}.weight"] = weight.contiguous()
    result |= {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return result, stored / weights


def parse(scheme: str) -> dict[str, Any]:
    """``w4g128z`` as GPTQModel's arguments."""
    bits, _, group = scheme.removeprefix("w").partition("g")
    return {"bits": int(bits), "group_size": int(group.rstrip("z") or -1), "sym": not scheme.endswith("z")}


def run_gptqmodel(arguments: argparse.Namespace) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    ids = load_file(arguments.input)["ids"]
    calibration = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    extra = {"method": "awq", "format": "gemm"} if arguments.method == "awq" else {}
    config = QuantizeConfig(**parse(arguments.scheme), **extra)
    model = GPTQModel.load(arguments.model, config)
    started = time.monotonic()
    model.quantize(calibration, batch_size=8)
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        tensors, bits = decode_folder(Path(folder))
    write(arguments.output, tensors, seconds, f"GPTQModel {version('gptqmodel')}", bits)


def run_gptqmodel_layers(arguments: argparse.Namespace) -> None:
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization import GPTQ

    result: dict[str, Tensor] = {}
    seconds = 0.0
    spelled = parse(arguments.scheme)
    with safe_open(arguments.input, "pt") as file:
        for key in [name for name in file.keys() if name.endswith(".weight")]:  # noqa: SIM118
            weight = file.get_tensor(key)
            inputs = file.get_tensor(key.replace(".weight", ".inputs"))
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            started = time.monotonic()
            quantizer = GPTQ(linear, QuantizeConfig(**spelled))
            quantizer.quantizer.configure(perchannel=True)
            for index, batch in enumerate(inputs.split(2048)):
                quantizer.add_batch(batch[None], linear(batch[None]), batch_index=index)
            result[key] = quantizer.quantize()[0].float().cpu().contiguous()
            seconds += time.monotonic() - started
    group = 0 if spelled["group_size"] < 0 else (16 + spelled["bits"]) / spelled["group_size"]
    write(arguments.output, result, seconds, f"GPTQModel {version('gptqmodel')}", spelled["bits"] + group)


def run_ggml(arguments: argparse.Namespace) -> None:
    import llama_cpp

    import gguf

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    pointer = ctypes.POINTER(ctypes.c_float)
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, *[ctypes.c_int64] * 3, pointer]
    kind = gguf.GGMLQuantizationType[arguments.type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    tensors = load_file(arguments.input)
    result: dict[str, Tensor] = {}
    seconds = 0.0
    for key in [name for name in tensors if name.endswith(".weight")]:
        source = np.ascontiguousarray(tensors[key].float().numpy())
        rows, columns = source.shape
        if columns % block:
            raise SystemExit(f"{key}: {columns} columns are no multiple of the block of {block}")
        target = np.empty((rows, columns // block * size), np.uint8)
        importance = tensors.get(key.replace(".weight", ".importance"))
        values = None if importance is None else np.ascontiguousarray(importance.float().numpy())
        imatrix = None if values is None else values.ctypes.data_as(pointer)
        started = time.monotonic()
        quantize(kind, source.ctypes.data_as(pointer), target.ctypes.data, 0, rows, columns, imatrix)
        seconds += time.monotonic() - started
        result[key] = torch.from_numpy(gguf.dequantize(target, kind)).contiguous()
    write(
        arguments.output,
        result,
        seconds,
        f"llama.cpp in llama-cpp-python {version('llama_cpp_python')}",
        8 * size / block,
    )


def run_llama_quantize(arguments: argparse.Namespace) -> None:
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    importance = {
        name: np.ascontiguousarray(values.float().numpy())
        for name, values in load_file(arguments.input).items()
        if name.endswith(".weight")
    }
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type.upper()}")
    parameters.nthread = torch.get_num_threads()
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):  # the last stays empty
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    source, target = str(arguments.model).encode(), str(arguments.file).encode()
    started = time.monotonic()
    status = llama_cpp.llama_model_quantize(source, target, parameters)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")
    name = f"llama.cpp in llama-cpp-python {version('llama_cpp_python')}"
    write(arguments.output, {}, seconds, name, float("nan"))


def write(path: Path, tensors: dict[str, Tensor], seconds: float, name: str, bits: float) -> None:
    save_file(tensors, path, metadata={"seconds": f"{seconds}", "version": name, "bits": f"{bits}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    peers = {
        "gptqmodel": run_gptqmodel,
        "gptqmodel-layers": run_gptqmodel_layers,
        "ggml": run_ggml,
        "llama-quantize": run_llama_quantize,
    }
    parser.add_argument("peer", choices=peers)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--scheme")
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--type")
    parser.add_argument("--file", type=Path)
    arguments = parser.parse_args()
    peers[arguments.peer](arguments)


if __name__ == "__main__":
    main()
