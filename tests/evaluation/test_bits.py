import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qkern
from qkern import FormatError, InputError, replace_linears
from qkern.demo import MODEL
from qkern.evaluation import bpw_file, bpw_linear, file_bytes, gguf_bpw_linear, parameter_count

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 24,
}
# A layer: q and o 16*16, k and v 8*16, three MLP matrices 32*16, two norms 16.
LAYER = 2 * 256 + 2 * 128 + 3 * 512 + 32


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"up": nn.Linear(128, 64), "down": nn.Linear(64, 128), "lm_head": nn.Linear(128, 10)}
    ).to(dtype)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("w4g32", 4.5), ("w4g32z", 4.625), ("w2g16", 3.0), ("w8g64", 8.25), ("w3g32", 3.5)]
)
def test_bpw_linear_counts_scales_and_zeros(scheme, bits):
    quantized = model()
    replace_linears(quantized, scheme)
    assert bpw_linear(quantized) == bits
    for layer in (quantized["up"], quantized["down"]):
        layer.pack()
    assert bpw_linear(quantized) == bits


def test_layers_left_out_count_with_their_dtype():
    quantized = model(torch.bfloat16)
    assert bpw_linear(quantized) == 16
    replace_linears(quantized, "w4g32", modules=["up"])
    assert bpw_linear(quantized) == (4.5 + 16) / 2
    # The head counts only when it is asked for.
    head = 10 * 128
    assert bpw_linear(quantized, skip=()) == (8192 * 20.5 + head * 16) / (2 * 8192 + head)


def test_no_linear_layer():
    with pytest.raises(InputError, match="no linear layer"):
        bpw_linear(nn.ReLU())


def folder(path, tie, **more):
    path.mkdir()
    config = CONFIG | {"tie_word_embeddings": tie, **more}
    (path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1000, dtype=torch.int32)}, path / "model-1.safetensors")
    save_file({"b": torch.zeros(500, dtype=torch.uint8)}, path / "model-2.safetensors")
    (path / "tokenizer.json").write_text("x" * 9999)
    return path


@pytest.mark.parametrize("tie", [True, False])
def test_bpw_file_is_all_bytes_over_all_parameters(tmp_path, tie):
    path = folder(
        tmp_path / "model", tie, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}
    )
    parameters = 2 * LAYER + 16 + 24 * 16 * (1 if tie else 2)
    assert parameter_count(path) == parameters
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size > 4500
    assert bpw_file(path) == 8 * size / parameters
    assert bpw_file(path / "model-2.safetensors", parameters=500) > 8


def test_bpw_of_a_gguf(tmp_path):
    import numpy as np

    import gguf

    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("a", np.zeros((8, 64), dtype=np.float32))
    writer.add_tensor("b", np.zeros((4, 2 * 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert parameter_count(file) == 8 * 64 + 4 * 64
    assert bpw_file(file) == 8 * file.stat().st_size / 768


def test_a_split_gguf_counts_as_a_whole(tmp_path):
    whole, first = tmp_path / "whole.gguf", tmp_path / "split.gguf"
    qkern.export_gguf(MODEL, whole, "q4_k_m")
    parts = qkern.export_gguf(MODEL, first, "q4_k_m", max_shard_size=500_000).files
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert parameter_count(part) == parameter_count(whole) == parameter_count(MODEL)
        assert file_bytes(part) == sum(file.stat().st_size for file in parts) > file_bytes(whole)
        assert bpw_file(part) == 8 * file_bytes(part) / parameter_count(MODEL)
    parts[1].unlink()
    with pytest.raises(FormatError, match="is missing; fetch it"):
        file_bytes(parts[0])


def test_bpw_linear_of_a_gguf_is_that_of_its_types(tmp_path):
    qkern.export_gguf(MODEL, tmp_path / "q8.gguf", "q8_0")
    assert gguf_bpw_linear(tmp_path / "q8.gguf") == 8.5
    types = {"ffn_down": "q4_0", "": "q8_0"}
    report = qkern.export_gguf(MODEL, tmp_path / "mixed.gguf", "q8_0", tensor_types=types)
    matrices = [tensor for tensor in report.tensors if "blk" in tensor.name and len(tensor.shape) == 2]
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    expected = 8 * sum(tensor.bytes for tensor in matrices) / weights
    assert 4.5 < gguf_bpw_linear(tmp_path / "mixed.gguf") == expected < 8.5


def test_unreadable_inputs(tmp_path):
    with pytest.raises(InputError, match="no weight files"):
        bpw_file(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        parameter_count(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json"):
        parameter_count(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="not a readable GGUF"):
        parameter_count(tmp_path / "bad.gguf")
