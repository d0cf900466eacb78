"""What qkern collects is what llama.cpp's own tool would, and llama.cpp's quantizer takes it."""

import ctypes

import numpy as np
import pytest
import torch

import qkern
from qkern.gguf import (
    PlannedTensor,
    add_tokenizer,
    architecture_for,
    read_imatrix,
    write_gguf,
    write_imatrix,
)
from qkern.ops.gguf_types import gguf_type

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'"
)

# llama-cpp-python leaves /dev/null open when it silences llama.cpp.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Node(ctypes.Structure):
    """The head of llama.cpp's ``struct ggml_tensor``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def source(self, index):
        return Node.from_address(self.src[index])

    def array(self, dtype):
        """Its values, as torch orders dimensions."""
        last = sum((ne - 1) * nb for ne, nb in zip(self.ne, self.nb, strict=True))
        raw = (ctypes.c_char * (last + np.dtype(dtype).itemsize)).from_address(self.data)
        return np.ndarray(tuple(self.ne)[::-1], dtype, raw, strides=tuple(self.nb)[::-1])


def op_name(number):
    from llama_cpp._ggml import libggml

    libggml.ggml_op_name.restype = ctypes.c_char_p
    return libggml.ggml_op_name(number).decode()


class Collector:
    """Sums squares at the products of a llama.cpp run, where its imatrix tool takes them."""

    def __init__(self):
        self.sums = {}
        self.counts = {}
        self.errors = []

    def see(self, pointer, ask, _):
        try:
            return self._see(Node.from_address(pointer), ask)
        except Exception as error:  # it would be lost in the callback
            self.errors.append(error)
            return not ask

    def _see(self, node, ask):
        kind = op_name(node.op)
        if kind not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        name = node.source(0).name.decode()
        if not name.startswith("blk."):
            return not ask
        if ask:
            return True
        x = node.source(1).array(np.float32).astype(np.float64)
        if kind == "MUL_MAT":
            rows = x.reshape(-1, x.shape[-1])
            experts = np.zeros(len(rows), int)
        else:
            chosen = node.source(2).array(np.int32)[0, 0]  # [tokens, experts of each]
            rows = np.broadcast_to(x[0], (*chosen.shape, x.shape[-1])).reshape(-1, x.shape[-1])
            experts = chosen.reshape(-1)
        matrices = node.source(0).ne[2]
        sums = self.sums.setdefault(name, np.zeros((matrices, x.shape[-1])))
        np.add.at(sums, experts, rows**2)
        self.counts.setdefault(name, np.zeros(matrices, int))
        self.counts[name] += np.bincount(experts, minlength=matrices)
        return True


def collect(path, ids):
    collector = Collector()
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = ids.shape[1]
    parameters.n_threads = parameters.n_threads_batch = 1
    # Flash attention rounds to fp16, and so does the default cache.
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector.see)
    parameters.cb_eval = callback
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(ids.shape[1], 0, 1)
    for row in ids.tolist():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(row)
        for position, token in enumerate(row):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1  # else the last layer leaves tokens out
        assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    assert collector.errors == []
    return collector


def equal_to_theirs(ours, theirs):
    assert set(ours.entries) == set(theirs.sums)
    for name, entry in ours.entries.items():
        assert entry.counts.tolist() == theirs.counts[name].tolist(), name
        expected = torch.from_numpy(theirs.sums[name])
        error = (entry.sums.double() - expected).abs().max() / expected.max()
        assert error < 1e-5, name


@pytest.fixture(scope="module")
def calibrated(shipped):
    """Calibration ids and the importance matrix of the shipped model."""
    from transformers import AutoTokenizer

    from qkern.calibration import load_texts, make_batches

    tokenizer = AutoTokenizer.from_pretrained(shipped)
    ids = make_batches(tokenizer, load_texts(shipped / "calibration.txt"), samples=4, length=128)
    return ids, qkern.imatrix(shipped, calibration=ids, length=128)


def test_sums_equal_those_of_llama_cpp(calibrated, exported):
    ids, ours = calibrated
    assert len(ours.entries) == 28
    equal_to_theirs(ours, collect(exported("f32"), ids))


def mixtral_file(folder, model, path):
    """A Mixtral as llama.cpp's converter lays it out."""
    config = model.config.to_dict()
    architecture = architecture_for("mistral")
    state = model.state_dict()
    names = architecture.names(config)
    tensors = {}
    for name, value in state.items():
        if ".mlp." not in name:
            tensors[names[name]] = architecture.to_file_order(name, value, config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        gate, up = state[f"{prefix}experts.gate_up_proj"].chunk(2, dim=1)
        parts = {"gate_inp": state[f"{prefix}gate.weight"], "gate_exps": gate, "up_exps": up}
        parts["down_exps"] = state[f"{prefix}experts.down_proj"]
        tensors |= {f"blk.{layer}.ffn_{part}.weight": value for part, value in parts.items()}
    planned = [
        PlannedTensor(
            name=name,
            source=name,
            type=gguf_type("f32"),
            shape=tuple(value.shape),
            read=lambda value=value: value,
        )
        for name, value in tensors.items()
    ]

    def add_metadata(writer):
        architecture.add_metadata(writer, config)
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        add_tokenizer(writer, folder, config["vocab_size"])

    write_gguf(path, architecture.name, planned, add_metadata)


def test_sums_of_experts_equal_those_of_llama_cpp(model_folder, tmp_path):
    folder, model = model_folder("mixtral", num_local_experts=8)
    mixtral_file(folder, model, tmp_path / "model.gguf")
    ids = torch.randint(0, 2000, (3, 48), generator=torch.Generator().manual_seed(0))
    ours = qkern.imatrix(folder, calibration=ids, length=48)
    assert len(ours.entries) == 2 * (4 + 1 + 3)
    experts = ours.entries["blk.1.ffn_down_exps.weight"]
    assert experts.sums.shape == (8, 96)
    assert int(experts.counts.sum()) == 2 * ids.numel()
    equal_to_theirs(ours, collect(tmp_path / "model.gguf", ids))


def quantized(source, path, values, file_type):
    """The bytes that llama.cpp's quantizer makes with an importance matrix."""
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    pointer = ctypes.POINTER(ctypes.c_float)
    for place, (name, array) in zip(entries, arrays.items(), strict=False):
        place.name, place.size = name.encode(), array.size
        place.data = array.ctypes.data_as(pointer)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    parameters.imatrix = entries  # ends with an entry without a name
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters) == 0
    return path.read_bytes()


def test_llama_quantize_makes_the_same_of_our_files(calibrated, exported, tmp_path):
    ids, ours = calibrated
    source = exported("f32")
    direct = {name: (entry.sums / entry.counts[:, None]).numpy() for name, entry in ours.entries.items()}
    expected = quantized(source, tmp_path / "direct", direct, 15)
    for name in ("m.gguf", "m.dat"):
        write_imatrix(tmp_path / name, ours)
        read = read_imatrix(tmp_path / name)
        values = {name: entry.mean.numpy() for name, entry in read.entries.items()}
        assert quantized(source, tmp_path / f"{name}.out", values, 15) == expected
    plain = quantized(source, tmp_path / "plain", {}, 15)
    assert plain != expected
    # The last bits of the sums differ, which hardly ever decides a code.
    theirs = collect(source, ids)
    values = {name: sums / theirs.counts[name][:, None] for name, sums in theirs.sums.items()}
    other = quantized(source, tmp_path / "theirs", values, 15)
    one, two, without = (np.frombuffer(content, np.uint8) for content in (expected, other, plain))
    assert (one != two).mean() < 0.01 * (one != without).mean()
