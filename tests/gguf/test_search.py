"""A search for GGUF: what its report says is what `export_gguf` writes of the assignment."""

import pytest
import torch

import gguf
from qkern.errors import InputError, UnsupportedError
from qkern.evaluation import gguf_bpw_linear, perplexity
from qkern.gguf import architecture_for
from qkern.nn import unfuse_experts
from qkern.pipelines import export_gguf, load, plan, search_assignment, sensitivity

IDS = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(3, 500, (6, 32), generator=torch.Generator().manual_seed(2))
DRAW = {"samples": 8, "length": 32}
SMALL = {**DRAW, "text": TEXT, "runtime": "gguf", "population": 4, "generations": 1}
# Rows of 256: K-quants everywhere; of 64 and 256: K-quants in down_proj alone; of 96: in none.
WHOLE = {"hidden_size": 256, "intermediate_size": 256}
PARTLY = {"hidden_size": 64, "intermediate_size": 256}


def decoded(folder, report):
    """Load the model of a folder with the weights of its GGUF, decoded by the gguf package."""
    model = load(folder, dtype=torch.float32)
    unfuse_experts(model)
    config = model.config.to_dict()
    architecture = architecture_for(config["model_type"])
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    for tensor in report.tensors:
        values = torch.from_numpy(
            gguf.dequantize(read[tensor.name].data, read[tensor.name].tensor_type).copy()
        )
        value = architecture.from_file_order(tensor.source, values.view(tensor.shape), config)
        names = architecture.pieces(tensor.source, len(value))
        for name, part in zip(names, value if len(names) > 1 else [value], strict=True):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(part.float(), requires_grad=False))
    if "lm_head.weight" not in {tensor.source for tensor in report.tensors}:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def check(folder, output, method, row):
    """Export an assignment of a report, and compare the file with what the report says of it."""
    made = export_gguf(folder, output, assignment=row.assignment, method=method, calibration=IDS, **DRAW)
    assert made.path.stat().st_size == row.bytes
    assert made.bpw_file == pytest.approx(row.bpw_file)
    # A gate of shared experts is a linear of the model, and a vector of the file.
    assert gguf_bpw_linear(made.path) == pytest.approx(row.bpw_linear, rel=3e-3)
    found = perplexity(decoded(folder, made), TEXT.flatten(), window=32)
    assert found == pytest.approx(row.perplexity, rel=2e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("model_type", "overrides", "options"),
    [
        ("llama", WHOLE, {"target_bpw": 4.5}),
        ("llama", PARTLY, {"target_bpw": 6.0}),
        ("llama", {}, {"target_bpw": 7.0}),
        ("llama", WHOLE, {"target_bpw_linear": 4.0}),
        ("llama", PARTLY, {"target_bpw": 7.8, "alleles": ("q2_k", "q4_k", "q6_k")}),
        ("qwen2", WHOLE, {"target_bpw": 4.5}),
        ("qwen2", WHOLE, {"target_bpw": 6, "embedding": False}),
        ("phi3", {**WHOLE, "tie_word_embeddings": True}, {"target_bpw": 5.5}),
        ("llama", PARTLY, {"target_bpw_linear": 13, "type": "f16", "alleles": ("q2_k", "q4_k", "q6_k")}),
    ],
)
def test_the_report_is_of_the_file(model_folder, tmp_path, method, model_type, overrides, options):
    folder, _ = model_folder(model_type, **overrides)
    report = search_assignment(folder, calibration=IDS, method=method, **SMALL, **options)
    # GPTQ's candidates are made behind the Lagrangian optimum; of others they are near what is written.
    row = next(row for row in report.others if row.found_by == "lagrangian")
    assert len(set(row.assignment.choices.values())) > 1
    check(folder, tmp_path / "a.gguf", method, row)
    if method == "rtn":
        check(folder, tmp_path / "best.gguf", method, report.best)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_are_one_gene_of_a_gguf(model_folder, tmp_path, model_type):
    folder, _ = model_folder(
        model_type, **WHOLE, moe_intermediate_size=256, shared_expert_intermediate_size=256
    )
    report = search_assignment(
        folder, calibration=IDS, method="rtn", target_bpw=3.6, alleles=("q2_k", "q3_k", "q4_k"), **SMALL
    )
    check(folder, tmp_path / "a.gguf", "rtn", report.best)
    choices = report.best.assignment.choices
    for layer in (0, 1):
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"model.layers.{layer}.mlp.experts.{number}.{part}" for number in range(4)]
            assert len({choices[name] for name in names}) == 1
    planned = plan(folder, type="q4_k_m", assignment=report.best.assignment, method="rtn", timed=False)
    # But for what a file says of its importance.
    assert planned.bytes_after == pytest.approx(report.best.bytes, abs=400)
    assert planned.bpw_linear == pytest.approx(report.best.bpw_linear, rel=3e-3)
    with pytest.raises(
        InputError, match=r"experts.\*.gate_proj.weight is one tensor of a GGUF, .* 3 of its 4"
    ):
        export_gguf(
            folder,
            tmp_path / "b.gguf",
            assignment={f"layers.0.mlp.experts.{number}.gate_proj": "q4_k" for number in range(3)},
        )
    with pytest.raises(InputError, match="4 of its 4 experts, with q2_k, q4_k: give all of them the same"):
        export_gguf(
            folder,
            tmp_path / "b.gguf",
            assignment={"*.experts.[012].up_proj": "q4_k", "*.experts.3.up_proj": "q2_k"},
        )
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("kind", ["q4_k_m", "f16"])
def test_a_tied_head_that_the_file_holds_by_itself(model_folder, tmp_path, kind):
    sizes = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    folder, _ = model_folder("qwen2_moe", **WHOLE, **sizes, tie_word_embeddings=True)
    options = {"type": kind, "target_bpw": 8.2, "alleles": ("q2_k", "q4_k", "q6_k", "q8_0")}
    report = search_assignment(folder, calibration=IDS, method="rtn", **SMALL, **options)
    assert report.kept["lm_head"] == f"not searched: {'f16' if kind == 'f16' else 'q6_k'} in the file"
    check(folder, tmp_path / "a.gguf", "rtn", report.best)


def test_what_is_not_searched_is_named_with_its_type(model_folder):
    folder, _ = model_folder("llama", **PARTLY)
    report = search_assignment(
        folder, calibration=IDS, method="rtn", target_bpw=7.8, alleles=("q2_k", "q6_k"), **SMALL
    )
    # What the mixture has in the place of a K-quant, in the file and in the score.
    assert report.kept["model.layers.0.self_attn.q_proj"] == "not searched: q5_0 in the file"
    assert report.best.assignment.choices["model.layers.0.self_attn.q_proj"] == "q5_0"


def test_texts_that_can_be_read_once_alone(model_folder):
    folder, _ = model_folder("llama", **WHOLE)
    options = {"method": "rtn", "target_bpw": 4.5, "alleles": ("q2_k", "q6_k")}
    texts = IDS.tolist()
    first, second = (
        search_assignment(folder, calibration=c, **SMALL, **options) for c in (texts, iter(texts))
    )
    assert first.best == second.best


def test_types_that_gptq_does_not_encode_are_refused_first(model_folder):
    folder, _ = model_folder("llama", **WHOLE)
    options = {"calibration": IDS, "target_bpw": 4.5, "alleles": ("q2_k", "iq4_xs", "q6_k")}
    with pytest.raises(UnsupportedError, match=r"GPTQ encodes .*, and linears get iq4_xs"):
        search_assignment(folder, **SMALL, **options)
    with pytest.raises(UnsupportedError, match=r"GPTQ encodes .*, and linears get iq4_xs"):
        sensitivity(folder, calibration=IDS, text=TEXT, runtime="gguf", alleles=("q2_k", "iq4_xs"))
    report = search_assignment(folder, method="rtn", **SMALL, **options)
    assert "iq4_xs" in report.best.assignment.choices.values()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_codes_that_no_importance_changes_may_be_all_that_is_found(model_folder, tmp_path, method):
    folder, _ = model_folder("llama", **WHOLE)
    report = search_assignment(
        folder, calibration=IDS, method=method, target_bpw=13, alleles=("q8_0", "16"), **SMALL
    )
    check(folder, tmp_path / "a.gguf", method, report.best)


def test_a_type_that_does_not_fit_is_the_assignments(model_folder, tmp_path):
    folder, _ = model_folder("llama", **PARTLY)
    with pytest.raises(
        InputError, match=r"gives model\.layers\.0\.self_attn\.q_proj q4_k, .* of 256 .* rows of 64"
    ):
        export_gguf(folder, tmp_path / "a.gguf", assignment={"*.q_proj": "q4_k"})
    with pytest.raises(InputError, match=r"the assignment gives .* choose another type"):
        plan(folder, type="q4_k_m", assignment={"*.q_proj": "q4_k"})


def test_sensitivities_are_of_what_can_be_written(model_folder):
    folder, _ = model_folder("mixtral", **WHOLE)
    with pytest.raises(UnsupportedError, match="gptq does not follow mixtures of experts"):
        sensitivity(folder, calibration=IDS, text=TEXT, runtime="gguf", alleles=("q2_k", "q4_k"))
