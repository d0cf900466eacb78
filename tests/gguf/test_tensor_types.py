"""Types of single tensors, and what a dry run says, through the whole export."""

import json

import pytest

from qkern.checkpoints import QuantizedCheckpoint
from qkern.errors import InputError, UnsupportedError
from qkern.gguf import MIXTURES, GGUFFile
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines import export_gguf

# llama-cpp-python leaves /dev/null open when it silences llama.cpp.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def types_of(path):
    with GGUFFile(path) as file:
        return {name: info.type.name for name, info in file.tensors.items()}


def run_cli(*arguments):
    from qkern.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0


def test_tensors_get_the_types_that_are_named(shipped, exported, tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(shipped, path, "q8_0", tensor_types={r"blk\.[01]\.ffn_down": "q4_1", "attn_k": "f16"})
    for name, kind in types_of(path).items():
        expected = types_of(exported("q8_0"))[name]
        if name in ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
            expected = "q4_1"
        elif name.endswith("attn_k.weight"):
            expected = "f16"
        assert kind == expected, name


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "bf16", "f32"])
def test_a_dry_run_knows_the_size_to_the_byte(kind, model_folder, tmp_path, monkeypatch):
    # Rows of 24 and 40 weights: few tensors fill their last 32 bytes.
    folder, _ = model_folder("qwen2", tie_word_embeddings=False, hidden_size=40, intermediate_size=24)
    options = {"tensor_types": {"ffn_down": "f16"}}
    written = export_gguf(folder, tmp_path / "written.gguf", kind, **options)
    monkeypatch.delattr(QuantizedCheckpoint, "__getitem__")  # no tensor is read
    planned = export_gguf(folder, tmp_path / "planned.gguf", kind, dry_run=True, **options)
    assert planned.is_dry_run
    assert not written.is_dry_run
    assert not (tmp_path / "planned.gguf").exists()
    assert planned.file_bytes == written.file_bytes == (tmp_path / "written.gguf").stat().st_size
    for field in ("type", "counts", "weights", "bpw_file", "tensors"):
        assert getattr(planned, field) == getattr(written, field)
    with GGUFFile(tmp_path / "written.gguf") as file:
        assert [(t.name, t.type) for t in planned.tensors] == [
            (name, info.type.name) for name, info in file.tensors.items()
        ]
    assert all(tensor.type == "f16" for tensor in planned.tensors if "ffn_down" in tensor.name)


def test_command_line(shipped, exported, tmp_path, capsys):
    output = tmp_path / "m.gguf"
    command = ("export-gguf", shipped, "--output", output, "--type", "q8_0", "--dry-run")
    assert run_cli(*command) == 0
    lines = capsys.readouterr().out.splitlines()
    size = exported("q8_0").stat().st_size
    assert lines[-1].startswith(f"q8_0, {size:,} bytes, bpw_file ")
    assert lines[-1].endswith(f", not written: {output}")
    types = types_of(exported("q8_0"))
    assert [tuple(line.split()[:2]) for line in lines[: len(types)]] == list(types.items())

    named = ("--tensor-type", "ffn_down=q4_0", "--tensor-type", r"blk\.0\.attn_(q|k)\.weight=f16")
    assert run_cli(*command, *named, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    planned = {tensor["name"]: tensor["type"] for tensor in report["plan"]}
    assert planned == {
        name: "q4_0"
        if "ffn_down" in name
        else "f16"
        if name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
        else kind
        for name, kind in types.items()
    }
    assert report["file_bytes"] > sum(tensor["bytes"] for tensor in report["plan"])
    assert list(tmp_path.iterdir()) == []


def test_the_ends_come_before_the_patterns(model_folder, tmp_path, capsys):
    folder, _ = model_folder("qwen2", tie_word_embeddings=False)
    command = [
        "export-gguf",
        folder,
        "--output",
        tmp_path / "m.gguf",
        "--type",
        "q4_0",
        "--dry-run",
        "--json",
    ]
    ends = ["--token-embedding-type", "f16", "--output-tensor-type", "Q5_1"]
    assert run_cli(*command, *ends, "--tensor-type", "^(token|output|blk.0).*weight=q8_0") == 0
    planned = {tensor["name"]: tensor["type"] for tensor in json.loads(capsys.readouterr().out)["plan"]}
    assert (planned["token_embd.weight"], planned["output.weight"]) == ("f16", "q5_1")
    assert planned["blk.0.ffn_up.weight"] == "q8_0"


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("embedding", "output"), [("q4_1", None), (None, "q5_1"), ("q4_1", "q5_1")])
def test_the_ends_are_as_llama_cpp_has_them(embedding, output, tied, pure, model_folder, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, _ = model_folder("qwen2", tie_word_embeddings=tied)
    source, target = tmp_path / "f32.gguf", tmp_path / "theirs.gguf"
    export_gguf(folder, source, "f32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.pure = MIXTURES["q4_0"].file_type, 1, pure
    if embedding is not None:
        parameters.token_embedding_type = gguf_type(embedding).id
    if output is not None:
        parameters.output_tensor_type = gguf_type(output).id
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0
    options = {"token_embedding_type": embedding, "output_tensor_type": output, "pure": pure, "dry_run": True}
    if pure and tied and output is not None:
        # What it says of the output has no effect there.
        with pytest.raises(InputError, match=r"output.*=q5_1: the pattern is in no tensor's name"):
            export_gguf(folder, tmp_path / "ours.gguf", "q4_0", **options)
        assert types_of(target)["token_embd.weight"] == (embedding or "q4_0")
        return
    ours = export_gguf(folder, tmp_path / "ours.gguf", "q4_0", **options)
    assert {tensor.name: tensor.type for tensor in ours.tensors} == types_of(target)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tensor-type", "ffn_down"], 2, "must be PATTERN=TYPE, such as ffn_down=q6_k: got 'ffn_down'"),
        (["--tensor-type", "=q6_k"], 2, "must be PATTERN=TYPE"),
        (["--tensor-type", "ffn=q8_0", "--tensor-type", "ffn=q6_k"], 2, "ffn= is there twice, q8_0 and q6_k"),
        (["--tensor-type", "ffn=iq1_s"], 1, "got 'iq1_s', allowed are f32"),
        (["--tensor-type", "nothing=q8_0"], 1, "nothing=q8_0: the pattern is in no tensor's name"),
        (["--output-tensor-type", "q9_0"], 1, "got 'q9_0', allowed are f32"),
        (["--type", "q2_k_s"], 1, "q2_k_s needs an importance matrix"),
    ],
)
def test_what_is_refused(arguments, code, message, shipped, tmp_path, capsys):
    assert run_cli("export-gguf", shipped, "--output", tmp_path / "m.gguf", *arguments) == code
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_is_no_expression_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(InputError, match=r"'\(ffn' is no regular expression"):
        export_gguf(tmp_path / "none", tmp_path / "m.gguf", "q8_0", tensor_types={"(ffn": "q8_0"})


def test_an_assignment_names_types_by_the_models_own_names(shipped, exported, tmp_path):
    assignment = {
        "*.layers.0.mlp.*": "q3_k",
        "model.layers.1.self_attn.v_proj": "q8_0",
        "model.layers.2.self_attn.v_proj": "16",
        "embed_tokens": "q4_0",
    }
    path = tmp_path / "model.gguf"
    export_gguf(shipped, path, "q4_k_m", assignment=assignment, tensor_types={"ffn": "q5_0"})
    found = types_of(path)
    assert {found[f"blk.0.ffn_{part}.weight"] for part in ("gate", "up", "down")} == {"q3_k"}
    assert found["blk.1.attn_v.weight"] == "q8_0"
    assert found["blk.2.attn_v.weight"] == "bf16"
    assert found["token_embd.weight"] == "q4_0"
    assert found["blk.1.ffn_up.weight"] == "q5_0"
    plain = types_of(exported("q4_k_m"))
    assert found["blk.3.attn_q.weight"] == plain["blk.3.attn_q.weight"]
    (tmp_path / "a.json").write_text(json.dumps(assignment))
    arguments = ("--assignment", tmp_path / "a.json", "--tensor-type", "ffn=q5_0")
    assert run_cli("export-gguf", shipped, "--output", tmp_path / "again.gguf", *arguments) == 0
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"lm_head": "q8_0"}, "'lm_head' names no tensor"),  # tied
        ({"input_layernorm": "q8_0"}, "'input_layernorm' names no tensor"),
        ({"o_proj": "w4"}, "which GGUF does not hold"),
        ({"o_proj": "iq1_s"}, "not a scheme, a GGUF type"),
    ],
)
def test_assignments_that_do_not_fit(shipped, tmp_path, assignment, message):
    with pytest.raises((InputError, UnsupportedError), match=message):
        export_gguf(shipped, tmp_path / "model.gguf", assignment=assignment)
    assert not list(tmp_path.iterdir())
