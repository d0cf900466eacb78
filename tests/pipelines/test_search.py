"""`sensitivity` and `search_assignment` on tiny models: sizes, candidates, resuming, refusals."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qkern
from qkern.calibration import load_texts, load_tokenizer, make_batches
from qkern.errors import InputError, UnsupportedError
from qkern.evaluation import perplexity
from qkern.evaluation.bits import bpw_linear
from qkern.models import column_weight
from qkern.nn import compute_mode, quant_linears
from qkern.pipelines import export_gguf, load, quantize, search_assignment, search_problem, sensitivity
from qkern.pipelines import search as module
from qkern.search import KEPT, Evaluator, MixedPrecision, evaluator

IDS = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(2))
ALLELES = ("w2g16", "w3g32", "w4g32", "w8")
SMALL = {"calibration": IDS, "text": TEXT, "alleles": ALLELES, "population": 6, "generations": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    """Make a store that has the candidates and sensitivities of the folder."""
    path = tmp_path_factory.mktemp("stores") / "store"
    sensitivity(folder, calibration=IDS, text=TEXT, alleles=ALLELES, store=path)
    return path


@pytest.fixture(scope="module")
def shipped():
    return Path(qkern.__file__).parent / "demo" / "data" / "bible"


def tensor_bytes(path):
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


def test_sensitivities(folder, store, tmp_path):
    report = sensitivity(
        folder,
        calibration=IDS,
        text=TEXT,
        alleles=(*ALLELES, KEPT),
        store=store,
        output=tmp_path / "out.json",
    )
    assert len(report.genes) == 14
    assert report.kept == {"lm_head": "output head"}
    assert report.tokens == TEXT.numel()  # one chunk
    first = report.genes[0]
    assert (first.names, first.layer, first.kind) == (
        ("model.layers.0.self_attn.q_proj",),
        0,
        "self_attn.q_proj",
    )
    for gene in report.genes:
        assert list(gene.kl) == [*ALLELES, KEPT]
        assert gene.kl["w2g16"] > gene.kl["w4g32"] > gene.kl["w8"] > gene.kl[KEPT] == 0
        assert gene.error["w2g16"] > gene.error["w4g32"] > gene.error["w8"] > 0
        assert KEPT not in gene.error
        per_channel = 16 / column_weight(load(folder).get_submodule(gene.names[0])).shape[1]
        assert gene.bits == {"w2g16": 3.0, "w3g32": 3.5, "w4g32": 4.5, "w8": 8 + per_channel, KEPT: 16.0}
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(report.as_dict()))
    assert not (tmp_path / "out.json.partial").exists()


def test_a_sensitivity_is_the_kl_of_that_change(folder, store):
    report = sensitivity(folder, calibration=IDS, text=TEXT, alleles=ALLELES, store=store)
    gene = report.genes[9]
    changed = quantize(load(folder), assignment={gene.names[0]: "w2g16"}, calibration=IDS)
    original = load(folder, dtype=torch.float32)
    changed = changed.float()
    with torch.no_grad():
        p, q = (m(input_ids=TEXT).logits.double().log_softmax(-1) for m in (original, changed))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert gene.kl["w2g16"] == pytest.approx(expected, rel=0.02)


def test_the_text_is_set_aside(tiny):
    model = tiny("llama")
    drawn = module.Texts.draw(module.open_source(model), IDS, None, None, 128, 32, 64)
    assert torch.equal(drawn.calibration, IDS[:6])
    assert torch.equal(drawn.scored, IDS[6:])
    drawn = module.Texts.draw(module.open_source(model), IDS[:2], None, None, 128, 32, 9999)
    assert (len(drawn.calibration), len(drawn.scored)) == (1, 1)


@pytest.mark.parametrize("samples", [4, 128])
def test_without_another_text_the_result_is_of_the_codes_that_are_written(folder, samples):
    text = [row.tolist() for row in IDS]  # of which sequences are drawn
    given = {**SMALL, "calibration": text, "text": None, "samples": samples, "length": 32, "tokens": 64}
    report = search_assignment(folder, **given, target_bpw_linear=3.5)
    assert report.samples == min(samples, 6)
    drawn = module.Texts.draw(module.open_source(folder), text, None, None, samples, 32, 64)
    assert torch.equal(drawn.calibration, make_batches(None, text, samples=report.samples, length=32))
    made = quantize(
        load(folder), assignment=report.best.assignment, calibration=text, samples=report.samples, length=32
    )
    original, made = load(folder, dtype=torch.float32), made.float()
    with torch.no_grad():
        p, q = (m(input_ids=drawn.scored).logits.double().log_softmax(-1) for m in (original, made))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert report.best.kl == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "target",
    [
        {"target_bpw_linear": 3.7},
        {"target_bpw": 7.5},
        {"target_compression": 0.45},
        {"target_bytes": 70_000},
    ],
)
def test_what_is_written_has_the_size(folder, store, tmp_path, target):
    report = search_assignment(folder, **SMALL, **target, store=store, output=tmp_path / "a.json")
    best = report.best
    assert MixedPrecision.read(tmp_path / "a.json") == best.assignment
    quantize(
        folder,
        assignment=tmp_path / "a.json",
        calibration=IDS,
        output=tmp_path / "out",
        format="compressed-tensors",
    )
    assert tensor_bytes(tmp_path / "out") == best.bytes
    loaded = load(tmp_path / "out")
    assert bpw_linear(loaded) == pytest.approx(best.bpw_linear, rel=1e-12)
    parameters = sum(p.numel() for p in load(folder).parameters())
    assert best.bpw_file == 8 * best.bytes / parameters
    ((kind, limit),) = target.items()

    def value(bytes_, linear):
        return {
            "target_bpw_linear": linear,
            "target_bpw": 8 * bytes_ / parameters,
            "target_compression": bytes_ / tensor_bytes(folder),
            "target_bytes": bytes_,
        }[kind]

    assert value(best.bytes, best.bpw_linear) <= limit
    # No single larger allele would fit.
    plan = module._plan(
        folder,
        "torch",
        ALLELES,
        "gptq",
        head=False,
        device="cpu",
        export={},
        target=module.Target(kind.removeprefix("target_"), limit),
    )
    for name, spelling in best.assignment.choices.items():
        if spelling != ALLELES[-1]:
            larger = ALLELES[ALLELES.index(spelling) + 1]
            facts = plan.sizes.of_assignment(
                plan.space, MixedPrecision({**best.assignment.choices, name: larger})
            )
            assert value(facts["bytes"], facts["bpw_linear"]) > limit
    assert {other.found_by for other in report.others} >= {"lagrangian", "greedy", "random"}
    assert [generation.number for generation in report.history] == [1, 2, 3]
    # By the candidates alone nothing that the first generation had is better.
    report = search_assignment(folder, **SMALL, **target, store=store, finalists=0)
    assert all(report.best.kl <= other.kl for other in report.others if other.found_by != "random")
    assert report.history[-1].loss == report.best.kl


def test_finalists_are_scored_by_what_is_written(folder, store):
    options = {**SMALL, "target_bpw_linear": 4.5, "store": store}
    report = search_assignment(folder, **options, finalists=4)
    others = {other.found_by: other for other in report.others}
    by_candidates = search_assignment(folder, **options, finalists=0)
    assert by_candidates.evaluations + 4 == report.evaluations
    reference, ids = load(folder, dtype=torch.float32), TEXT
    for row in (report.best, others["lagrangian"]):
        made = quantize(reference, method="gptq", assignment=row.assignment, calibration=IDS)
        with torch.no_grad(), compute_mode(made, "float"):
            p, q = (torch.log_softmax(one(ids).logits.double(), -1) for one in (reference, made))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert row.kl == pytest.approx(kl, rel=1e-4)
    # Here the best by the candidates is not the best of what is written.
    assert report.best.kl < others["lagrangian"].kl
    assert report.best.assignment != by_candidates.best.assignment
    assert search_assignment(folder, **options, finalists=4).best == report.best
    optimum, *tried = report.finalists
    assert (optimum.found_by, len(tried)) == ("lagrangian", 4)
    assert optimum.assignment == others["lagrangian"].assignment
    assert optimum.kl == optimum.by_candidates == others["lagrangian"].kl
    least = min(report.finalists, key=lambda finalist: finalist.kl)
    assert (least.kl, least.assignment) == (report.best.kl, report.best.assignment)
    assert min(tried, key=lambda one: one.by_candidates).assignment == by_candidates.best.assignment
    assert by_candidates.finalists == ()
    assert json.loads(json.dumps(report.as_dict()))["finalists"][0] == optimum.as_dict()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_candidates_behind_a_base_are_those_of_quantize(folder, tmp_path, method):
    plan = module._plan(folder, "torch", ALLELES, method, head=True, device="cpu", export={})
    texts = module.Texts(calibration=IDS, scored=TEXT)
    rng = np.random.default_rng(0)
    genome = tuple(int(a) for a in rng.integers(0, 4, size=len(plan.space)))
    base = plan.space.assignment(genome)
    options = {"store": tmp_path / "store", "resume": True, "top_k": None, "simulate": False}
    with module._opened(plan, texts, None, **options) as problem:
        candidates, losses = problem.opened(base)
        made = {}
        for index in range(plan.structure.count + 1):
            made |= candidates.layer(index)
        (kl,) = losses([genome])
    expected = quantize(load(folder), method=method, assignment=base, calibration=IDS)
    for name, linear in quant_linears(expected).items():
        candidate = made[f"{name}@{base.choices[name]}"]
        assert torch.equal(linear.quantized().codes, candidate.codes)
        assert torch.equal(linear.quantized().scales, candidate.scales)
    original = load(folder, dtype=torch.float32)
    with torch.no_grad():
        p, q = (m(input_ids=TEXT).logits.double().log_softmax(-1) for m in (original, expected.float()))
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)


def test_a_killed_search_goes_on(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(evaluator, "_CHUNK_TOKENS", 32)  # six chunks, so that there are stages
    options = {**SMALL, "target_bpw_linear": 3.7}
    evaluated, original, every = [], Evaluator.kl, []
    with monkeypatch.context() as patch:
        patch.setattr(
            Evaluator,
            "kl",
            lambda self, genomes, *args: every.extend(genomes) or original(self, genomes, *args),
        )
        whole = search_assignment(folder, **options, output=tmp_path / "whole.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.json"]

    def counted(self, genomes, chunks=slice(None)):
        if len(evaluated) == 70:
            raise KeyboardInterrupt
        evaluated.extend(genomes)
        del evaluated[70:]
        return original(self, genomes, chunks)

    monkeypatch.setattr(Evaluator, "kl", counted)
    with pytest.raises(KeyboardInterrupt):
        search_assignment(folder, **options, output=tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole.json"] == ["a.json.partial"]
    assert "interrupted; 16 files of candidates are kept in" in caplog.text
    # Of another model, and with other texts, it is of no use.
    other = load(folder)
    with torch.no_grad():
        column_weight(other.model.layers[1].mlp.up_proj).mul_(2)
    with pytest.raises(InputError, match=r"another run \(of a model with other weights\)"):
        search_assignment(other, **options, output=tmp_path / "a.json")
    with pytest.raises(InputError, match=r"another run \(with other calibration tokens\)"):
        search_assignment(folder, **{**options, "calibration": IDS.flip(0)}, output=tmp_path / "a.json")
    asked = []
    monkeypatch.setattr(
        Evaluator, "kl", lambda self, genomes, *args: asked.extend(genomes) or original(self, genomes, *args)
    )
    again = search_assignment(folder, **options, output=tmp_path / "a.json")
    assert (again.best, again.others, again.history) == (whole.best, whole.others, whole.history)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "whole.json"]
    # What the first run had evaluated in whole portions was not evaluated again.
    assert 0 < len(asked) < len(every) - 40


@pytest.mark.parametrize("was_there", [True, False])
def test_a_search_that_made_nothing_leaves_nothing(folder, tmp_path, monkeypatch, was_there):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_problem, "make_candidates", interrupt)
    if was_there:
        (tmp_path / "store").mkdir()
    with pytest.raises(KeyboardInterrupt):
        search_assignment(folder, **SMALL, target_bpw_linear=3.7, store=tmp_path / "store")
    assert list(tmp_path.rglob("*")) == [tmp_path / "store"][:was_there]


def test_known_losses_are_not_computed_again(folder, store, monkeypatch):
    options = {**SMALL, "target_bpw_linear": 4.2, "store": store}
    first = search_assignment(folder, **options)

    def never(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Evaluator, "kl", never)
    second = search_assignment(folder, **options)
    assert (first.best, first.others, first.history) == (second.best, second.others, second.history)
    assert first.evaluations == second.evaluations
    with pytest.raises(AssertionError):
        search_assignment(folder, **options, seed=1)


def test_a_front(folder, store, tmp_path, monkeypatch):
    output = tmp_path / "front"
    with monkeypatch.context() as patch:
        patch.setattr(module.SearchReport, "as_dict", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search_assignment(folder, **SMALL, pareto=True, store=store, output=output)
    assert list(tmp_path.iterdir()) == []  # all of it, or nothing
    report = search_assignment(folder, **SMALL, pareto=True, store=store, output=output)
    assert report.best is None
    found = {
        name: [point for point in report.others if point.found_by == name]
        for name in ("pareto", "lagrangian", "greedy", "random")
    }
    assert sum(map(len, found.values())) == len(report.others)
    assert len(found["pareto"]) >= 6
    for name in ("pareto", "random"):
        sizes = [point.bytes for point in found[name]]
        assert sizes == sorted(set(sizes))
        kls = [point.kl for point in found[name]]
        assert kls == sorted(kls, reverse=True)
    # Nothing that was evaluated beats it.
    for point in (point for points in found.values() for point in points):
        assert any(on.bytes <= point.bytes and on.kl <= point.kl for on in found["pareto"])
    largest = found["pareto"][-1].bytes
    assert all(point.bytes <= largest for points in found.values() for point in points)
    files = sorted(output.glob("0*.json"))
    assert [MixedPrecision.read(file) for file in files] == [point.assignment for point in found["pareto"]]
    assert json.loads((output / "front.json").read_text())["target"] == "every size"


def test_a_store_serves_other_alleles_and_runtimes(folder, tmp_path):
    options = {"calibration": IDS, "text": TEXT, "store": tmp_path / "store", "method": "rtn"}
    # w4g64 and w4 have the same size where a row has 64 columns: w4 goes there.
    first = sensitivity(folder, **options, alleles=("w4g64", "w4"))
    again = sensitivity(folder, **options, alleles=("w4", "w8"))
    assert {tuple(gene.kl) for gene in first.genes} != {tuple(gene.kl) for gene in again.genes}
    for one, other in zip(first.genes, again.genes, strict=True):
        for spelling in one.kl.keys() & other.kl.keys():
            assert one.kl[spelling] == other.kl[spelling]


def test_the_head_and_int8_activations(folder):
    alleles = ("w2g16a8", "w4g32a8", "w8a8")
    report = search_assignment(
        folder, **{**SMALL, "alleles": alleles, "generations": 1}, target_bpw=8.5, head=True
    )
    assert report.best.bpw_file <= 8.5
    assert set(report.best.assignment.choices) == {
        *quant_linears(quantize(load(folder), method="rtn")),
        "lm_head",
    }
    assert set(report.best.assignment.choices.values()) <= set(alleles)


def test_simulated_and_real_losses_agree(folder, store):
    real, simulated = (
        sensitivity(folder, calibration=IDS, text=TEXT, alleles=ALLELES, store=store, simulate=simulate)
        for simulate in (False, True)
    )
    for one, other in zip(real.genes, simulated.genes, strict=True):
        assert one.error == other.error
        for spelling in ALLELES:
            assert one.kl[spelling] == pytest.approx(other.kl[spelling], rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_gguf_has_the_size_and_the_perplexity_of_the_report(tmp_path, shipped, embedding):
    LlamaCpp = pytest.importorskip("qkern.evaluation.llama_cpp").LlamaCpp
    pytest.importorskip("llama_cpp")
    texts = load_texts(shipped / "search.txt", tokenizer=load_tokenizer(shipped))
    ids = make_batches(load_tokenizer(shipped), texts, samples=10, length=512)
    report = search_assignment(
        shipped,
        calibration=ids[6:],
        text=ids[:6],
        runtime="gguf",
        method="rtn",
        alleles=("q2_k", "q4_k", "q6_k"),
        target_bytes=1_500_000 if embedding else None,
        target_bpw_linear=None if embedding else 3.5,
        type="q8_0",
        population=2,
        generations=1,
        output=tmp_path / "a.json",
    )
    assert ("model.embed_tokens" in report.kept) != embedding
    table = report.best.assignment.choices["model.embed_tokens"]
    assert table in ("q2_k", "q4_k", "q6_k") if embedding else table == "q8_0"
    assert {"q2_k", "q4_k"} < set(report.best.assignment.choices.values())
    made = export_gguf(
        shipped, tmp_path / "a.gguf", "q4_k_m", assignment=tmp_path / "a.json", calibration=ids[6:]
    )
    assert made.path.stat().st_size == report.best.bytes
    assert made.bpw_file == pytest.approx(report.best.bpw_file)
    found = perplexity(LlamaCpp(made.path), ids[:6].flatten())
    assert found == pytest.approx(report.best.perplexity, rel=0.005)
    assert report.best.perplexity > report.perplexity * 1.01


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, InputError, r"needs one target of target_bpw \(--target-bpw\), .*: got none"),
        (
            {"target_bpw": 3, "target_bytes": 4},
            InputError,
            "one target of .*: got target_bpw and target_bytes",
        ),
        ({"target_bpw": math.nan}, InputError, "target_bpw must be a positive number: got nan"),
        (
            {"target_bpw_linear": 2.0},
            InputError,
            r"no assignment is as small as 2 bits a weight of the linears: the smallest of the alleles "
            r"takes 3\.0000 bits a weight of the linears, the largest 8\.2",
        ),
        ({"target_bpw_linear": 2.99999}, InputError, r"as small as 2\.99999 bits .* takes 3\.0000 bits"),
        ({"target_bpw_linear": 9.0}, InputError, "nothing to search: all are within 9 bits"),
        ({"target_compression": 0.01}, InputError, "0.01 of the original's bytes: the smallest"),
        ({"target_bytes": 10}, InputError, "no assignment is as small as 10 bytes"),
        ({"target_bpw": 3, "embedding": True}, UnsupportedError, "no checkpoint format holds quantized"),
        ({"target_bpw": 3, "pareto": True}, InputError, "leave the target out"),
        ({"target_bpw": 3, "runtime": "exl3"}, InputError, "unknown runtime"),
        ({"target_bpw": 3, "runtime": "vllm"}, UnsupportedError, "in runtime vllm"),
        ({"target_bpw": 3, "method": "awq"}, InputError, "candidates are made by gptq or rtn"),
        ({"target_bpw_linear": 4, "population": 1}, InputError, "population of 2"),
        ({"target_bpw_linear": 4, "seed": -1}, InputError, "seed must be 0 or more: got -1"),
        (
            {"target_bpw_linear": 4, "finalists": -1},
            InputError,
            "a whole number from 0: got -1",
        ),
        ({"target_bpw_linear": 4, "finalists": 1.5}, InputError, "a whole number from 0: got 1.5"),
        ({"pareto": True, "finalists": 2}, InputError, "a front has no finalists: got 2"),
        (
            {"target_bpw_linear": 4, "method": "rtn", "finalists": 2},
            InputError,
            "rounding to nearest has no finalists: got 2",
        ),
        ({"target_bpw_linear": 4, "type": "q4_k_m", "runtime": "ggfu"}, InputError, "unknown runtime"),
        ({"target_bpw_linear": 4, "type": "q4_k_m"}, InputError, "for runtime gguf: got 'q4_k_m' for torch"),
        ({"target_bpw_linear": 4, "head": True}, InputError, "neither the embedding nor the head"),
        ({"target_bpw_linear": 4, "alleles": []}, InputError, "nothing to choose: got no alleles"),
        ({"target_bpw_linear": 4, "text": TEXT[:, :2]}, InputError, "sequences of 4 tokens: got length 2"),
        ({"target_bpw_linear": 4, "top_k": 0}, InputError, "top_k must be at least 1"),
        ({"target_bpw_linear": 4, "tokens": 1}, InputError, "tokens must be at least 2"),
        ({"target_bpw_linear": 4, "length": 2}, InputError, "sequences of 4 tokens: got length 2"),
        ({"target_bpw_linear": 4, "alleles": ["16"]}, InputError, "nothing to choose: got 16 alone"),
        (
            {"target_bpw_linear": 4, "calibration": [[5]], "text": None},
            InputError,
            "calibration text is shorter than one sequence: it has 1 tokens",
        ),
        (
            {"target_bpw_linear": 4, "calibration": IDS[:1, :1]},
            InputError,
            "calibration text is in sequences of one",
        ),
        (
            {"target_bpw_linear": 4, "text": IDS[:1, :1]},
            InputError,
            "search text is in sequences of one",
        ),
        (
            {"target_bpw_linear": 4, "text": [[5]]},
            InputError,
            "search text is shorter than one sequence: it has 1 tokens",
        ),
        (
            {"target_bpw_linear": 4, "calibration": IDS[:1], "text": None},
            InputError,
            "a search needs one to choose codes by and another to score them on",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(folder, tmp_path, monkeypatch, change, error, message):
    def never(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(search_problem, "make_candidates", never)
    with pytest.raises(error, match=message):
        search_assignment(folder, **{**SMALL, **change}, output=tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [{"target_bpw_linear": 4}, {"pareto": True}])
@pytest.mark.parametrize(
    ("store", "output", "message"),
    [
        ("same", "same", "are both .*same: choose two paths"),
        ("same/store", "same", "are one inside the other, .*same and .*same/store: choose paths apart"),
        ("same", "same/a.json", "are one inside the other"),
    ],
)
def test_the_output_is_apart_from_the_store(folder, tmp_path, monkeypatch, target, store, output, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        search_assignment(folder, **SMALL, **target, store=tmp_path / store, output=output)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist_are_left_alone(folder, tmp_path):
    (tmp_path / "a.json").write_text("mine")
    for target in ({"pareto": True}, {"target_bpw": 4}):
        with pytest.raises(InputError, match=r"a\.json exists"):
            search_assignment(folder, **SMALL, **target, output=tmp_path / "a.json")
    with pytest.raises(InputError, match="exists"):
        sensitivity(folder, calibration=IDS, output=tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "mine"


def test_each_way_of_scoring_has_its_own_losses(folder, store):
    before = set(store.glob("losses-*.jsonl"))
    for change in ({"top_k": 4}, {"text": IDS}, {"alleles": ALLELES[:2]}):
        options = {"calibration": IDS, "text": TEXT, "alleles": ALLELES, **change}
        sensitivity(folder, **options, store=store)
        after = set(store.glob("losses-*.jsonl"))
        (new,) = after - before
        assert len(new.read_text().splitlines()) == 14 * len(options["alleles"])
        before = after


def test_the_bounds_that_an_error_names_are_met(folder):
    options = {"calibration": IDS, "text": TEXT, "method": "rtn", "population": 2, "generations": 1}
    for kind in ("target_bpw", "target_bpw_linear", "target_compression", "target_bytes"):
        with pytest.raises(InputError, match="the smallest of the alleles takes") as refused:
            search_assignment(folder, **options, alleles=("w2g16", "w3g32"), **{kind: 1e-9})
        low, high = re.findall(r"(?:takes|largest) ([\d.,]+)", str(refused.value))
        low, high = (float(bound.strip(",").replace(",", "")) for bound in (low, high))
        report = search_assignment(folder, **options, alleles=("w2g16", "w3g32"), **{kind: low})
        assert set(report.best.assignment.choices.values()) == {"w2g16"}
        with pytest.raises(InputError, match="nothing to search: all are within"):
            search_assignment(folder, **options, alleles=("w2g16", "w3g32"), **{kind: 1.01 * high})


def test_a_front_of_one_choice_is_a_point(folder):
    report = search_assignment(folder, **{**SMALL, "alleles": ("w4g32",)}, pareto=True)
    assert {point.found_by for point in report.others} == {"pareto", "lagrangian", "greedy", "random"}
    assert len({point.bytes for point in report.others}) == 1


def test_a_runtime_that_can_load_no_default_choice(folder):
    message = r"no linear can be quantized for runtime vllm, as \w+: .* vLLM's kernels take multiples of 64"
    with pytest.raises(UnsupportedError, match=message):
        sensitivity(folder, calibration=IDS, text=TEXT, runtime="vllm")


def test_damaged_candidates_are_an_error(folder, tmp_path):
    options = {"calibration": IDS, "text": TEXT, "method": "rtn", "alleles": ("w2g16",)}
    sensitivity(folder, **options, store=tmp_path / "store")
    (file,) = (tmp_path / "store").glob("layer-00001.w2g16.*.safetensors")
    facts = json.dumps({"weights": {}, "records": {}})
    save_file({"nothing": torch.zeros(1)}, file, metadata={"facts": facts})
    with pytest.raises(InputError, match=r"layer-00001\.w2g16\.\w+\.safetensors is damaged: remove it"):
        sensitivity(folder, **options, store=tmp_path / "store")


def test_rows_without_whole_groups_have_smaller_ones(tiny, tmp_path):
    tiny("llama", hidden_size=192, intermediate_size=160).save_pretrained(tmp_path / "model")
    report = sensitivity(tmp_path / "model", calibration=IDS, text=TEXT, method="rtn")
    alleles = {gene.kind: tuple(gene.kl) for gene in report.genes}
    assert alleles["self_attn.q_proj"] == ("w2g64", "w3g64", "w4g64", "w8")
    assert alleles["mlp.down_proj"] == ("w2g32", "w3g32", "w4g32", "w8")
    with pytest.raises(UnsupportedError, match="no linear can have w4g128"):
        sensitivity(tmp_path / "model", calibration=IDS, text=TEXT, alleles=("w2g32", "w4g128"))


def test_bits_of_linears_do_not_bound_an_embedding(shipped):
    options = {"runtime": "gguf", "alleles": ("q4_0", "q8_0"), "embedding": True}
    with pytest.raises(InputError, match="target_bpw_linear counts linears of the layers, neither"):
        search_assignment(shipped, calibration=IDS, text=TEXT, target_bpw_linear=5, **options)
