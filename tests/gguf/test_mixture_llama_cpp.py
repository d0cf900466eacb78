"""Types of every mixture against llama.cpp's own quantizer, tensor by tensor, on models of random weights."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from qkern.errors import InputError
from qkern.gguf import MIXTURES, GGUFFile
from qkern.gguf.mixture import ModelFacts, choose_types
from qkern.gguf.overrides import parse_overrides
from qkern.ops.gguf_types import gguf_type

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'"
)

ROWS = 2  # the fewest that make a matrix: types depend on the length of rows alone


@dataclass(frozen=True)
class Shape:
    """A model without meaning: names and shapes as llama.cpp's converter would write them."""

    architecture: str
    layers: int = 4
    hidden: int = 256
    inner: int = 256
    heads: int = 4
    value_heads: int = 4
    experts: int = 0
    tied: bool = False

    @property
    def facts(self):
        return {
            name: getattr(self, name)
            for name in ("architecture", "layers", "heads", "value_heads", "experts")
        }

    def tensors(self):
        hidden, inner, architecture = (self.hidden,), (self.inner,), self.architecture
        shapes = {"token_embd.weight": (3, *hidden), "output_norm.weight": hidden}
        if architecture == "bert":
            shapes |= {"token_types.weight": (2, *hidden), "position_embd.weight": (4, *hidden)}
            shapes |= {"token_embd_norm.weight": hidden, "token_embd_norm.bias": hidden}
        if not self.tied:
            shapes["output.weight"] = (3, *hidden)
        for layer in range(self.layers):
            parts = {
                "attn_norm.weight": hidden,
                "ffn_norm.weight": hidden,
                "attn_output.weight": (ROWS, *hidden),
            }
            if architecture == "phi3":
                parts["attn_qkv.weight"] = (ROWS, *hidden)
            else:
                parts |= {f"attn_{kind}.weight": (ROWS, *hidden) for kind in "qkv"}
            if architecture in ("qwen2", "bert"):
                parts |= {f"attn_{kind}.bias": (ROWS,) for kind in "qkv"}
            if architecture.startswith("qwen3"):
                parts |= {f"attn_{kind}_norm.weight": hidden for kind in "qk"}
            if architecture == "gemma2":
                parts |= {"post_attention_norm.weight": hidden, "post_ffw_norm.weight": hidden}
            if architecture == "bert":
                parts |= {"attn_output_norm.weight": hidden, "layer_output_norm.weight": hidden}
            if self.experts:
                parts["ffn_gate_inp.weight"] = (self.experts, *hidden)
                parts |= {f"ffn_{kind}_exps.weight": (self.experts, ROWS, *hidden) for kind in ("gate", "up")}
                parts["ffn_down_exps.weight"] = (self.experts, ROWS, *inner)
            if architecture == "qwen2moe":
                parts["ffn_gate_inp_shexp.weight"] = hidden
                parts |= {f"ffn_{kind}_shexp.weight": (ROWS, *hidden) for kind in ("gate", "up")}
                parts["ffn_down_shexp.weight"] = (ROWS, *inner)
            if not self.experts:
                gates = () if architecture in ("phi3", "bert") else ("gate",)
                parts |= {f"ffn_{kind}.weight": (ROWS, *hidden) for kind in (*gates, "up")}
                parts["ffn_down.weight"] = (ROWS, *inner)
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
        return shapes

    def write(self, path):
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(64)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.value_heads)
        writer.add_vocab_size(3)
        writer.add_layer_norm_eps(1e-5)
        writer.add_layer_norm_rms_eps(1e-5)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        generator = np.random.default_rng(0)
        for name, shape in self.tensors().items():
            writer.add_tensor(name, generator.standard_normal(shape, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class Quantizer:
    """llama.cpp's quantizer on one model."""

    def __init__(self, model, folder):
        self.model = model
        self.shapes = model.tensors()
        self.source, self.target = folder / "f32.gguf", folder / "quantized.gguf"
        model.write(self.source)
        matrices = [(name, shape) for name, shape in self.shapes.items() if len(shape) > 1]
        entries = (llama_cpp.llama_model_imatrix_data * (len(matrices) + 1))()
        self.ones = np.ones(max(np.prod(shape) for _, shape in matrices), np.float32)
        ones = self.ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        for entry, (name, shape) in zip(entries, matrices, strict=False):  # the last has no name: the end
            entry.name, entry.data = name.encode(), ones
            entry.size = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        self.importance = entries

    def types(self, mixture, *, importance=False, pure=False, overrides=None):
        """Types by name, or None where llama.cpp refuses."""
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread, parameters.pure = MIXTURES[mixture].file_type, 1, pure
        if importance:
            parameters.imatrix = self.importance
        if overrides:
            patterns = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
            for entry, (pattern, kind) in zip(patterns, overrides.items(), strict=False):
                entry.pattern, entry.type = pattern.encode(), gguf_type(kind).id
            parameters.tt_overrides = patterns
        if llama_cpp.llama_model_quantize(str(self.source).encode(), str(self.target).encode(), parameters):
            return None
        with GGUFFile(self.target) as file:
            return {name: info.type.name for name, info in file.tensors.items()}

    def our_types(self, mixture, *, importance=False, pure=False, overrides=None):
        model = ModelFacts(**self.model.facts, importance=importance)
        types = choose_types(
            MIXTURES[mixture], self.shapes, model, overrides=parse_overrides(overrides or {}), pure=pure
        )
        return {name: kind.name for name, kind in types.items()}


def compare(model, folder, *, pures=(False, True)):
    """Compare every mixture, with and without importance and pure."""
    quantizer = Quantizer(model, folder)
    for mixture in MIXTURES:
        for importance in (False, True):
            for pure in pures:
                options = {"importance": importance, "pure": pure}
                theirs = quantizer.types(mixture, **options)
                if theirs is None:
                    assert MIXTURES[mixture].needs_importance
                    assert not importance
                    with pytest.raises(InputError, match="q2_k_s needs an importance matrix"):
                        quantizer.our_types(mixture, **options)
                    continue
                assert quantizer.our_types(mixture, **options) == theirs, (model, mixture, options)


MODELS = {
    "llama": Shape("llama", layers=32, heads=8, value_heads=2),
    "llama-tied-mha": Shape("llama", layers=5, tied=True),
    "llama-70b": Shape("llama", layers=80, heads=8, value_heads=1),
    "qwen2-0.5b": Shape("qwen2", layers=24, hidden=896, inner=288, heads=14, value_heads=2, tied=True),
    "qwen3": Shape("qwen3", layers=17, inner=288, heads=4, value_heads=2),
    "mixtral": Shape("llama", layers=16, heads=8, value_heads=2, experts=8),
    "qwen2moe": Shape("qwen2moe", layers=9, experts=4, inner=288),
    "qwen3moe": Shape("qwen3moe", layers=9, experts=16, heads=8, value_heads=1),
    "gemma2": Shape("gemma2", layers=10, heads=4, value_heads=2, tied=True),
    "phi3": Shape("phi3", layers=9),
    "bert": Shape("bert", layers=6, tied=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(name, tmp_path):
    compare(MODELS[name], tmp_path, pures=(False, True) if MODELS[name].layers < 32 else (False,))


@pytest.mark.slow
@pytest.mark.parametrize("value_heads", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("hidden", "inner", "tied"), [(256, 512, False), (896, 256, True), (288, 288, False), (512, 896, True)]
)
@pytest.mark.parametrize("layers", [4, 7, 16, 28, 32, 80])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mixtral", "qwen2moe", "qwen3moe"])
def test_types_of_many_shapes_are_those_of_llama_cpp(
    architecture, layers, hidden, inner, tied, value_heads, tmp_path
):
    experts = 8 if architecture == "mixtral" or architecture.endswith("moe") else 0
    architecture = "llama" if architecture == "mixtral" else architecture
    compare(
        Shape(architecture, layers, hidden, inner, 8, value_heads, experts, tied), tmp_path, pures=(False,)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {r"ffn_down": "q8_0"},
        # A tensor that is named is not counted: the rules' places move down by one.
        {r"blk\.0\.": "q6_k"},
        {r"blk\.(0|3|7)\.attn_v": "q4_0", r"\.attn_": "q5_k", r"^(token_embd|output)\.weight$": "q8_0"},
        {r"blk\.[0-3]\.ffn_(up|down)": "bf16", "ffn_gate": "iq4_nl", "blk": "q3_k"},
    ],
)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_overrides_decide_as_in_llama_cpp(name, overrides, tmp_path):
    quantizer = Quantizer(MODELS[name], tmp_path)
    for mixture in ("q3_k_m", "q4_k_m", "q4_0"):
        for pure in (False, True):
            options = {"overrides": overrides, "pure": pure, "importance": True}
            assert quantizer.our_types(mixture, **options) == quantizer.types(mixture, **options)


def test_rows_that_no_block_divides(tmp_path):
    quantizer = Quantizer(Shape("llama", hidden=256, inner=48), tmp_path)
    for mixture in MIXTURES:
        theirs, ours = (types(mixture, importance=True) for types in (quantizer.types, quantizer.our_types))
        # llama.cpp has no fallback for types whose blocks are small, and gives up.
        if theirs is None:
            assert gguf_type(MIXTURES[mixture].base).block == 32
            assert ours["blk.3.ffn_down.weight"] == "f16"
        else:
            assert ours == theirs
