"""Exports weighed by activations, and importance matrices that do not fit the model."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import qkern
from qkern.errors import FormatError, InputError
from qkern.gguf import GGUFFile, Imatrix, ImatrixEntry, PlannedTensor, write_gguf, write_imatrix
from qkern.ops import gguf_encode
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines import export_gguf

SETTINGS = {"samples": 8, "length": 128}


@pytest.fixture(scope="module")
def matrix(shipped):
    return qkern.imatrix(shipped, calibration=shipped / "calibration.txt", **SETTINGS)


def raw(path):
    with GGUFFile(path) as file:
        return {name: file[name].raw for name in file}


def test_calibration_and_its_file_give_the_same(matrix, shipped, tmp_path):
    write_imatrix(tmp_path / "m.gguf", matrix)
    export_gguf(shipped, tmp_path / "text.gguf", calibration=shipped / "calibration.txt", **SETTINGS)
    export_gguf(shipped, tmp_path / "file.gguf", imatrix=tmp_path / "m.gguf")
    export_gguf(shipped, tmp_path / "memory.gguf", imatrix=matrix)
    expected = raw(tmp_path / "text.gguf")
    for name in ("file", "memory"):
        for tensor, value in raw(tmp_path / f"{name}.gguf").items():
            assert torch.equal(value, expected[tensor]), tensor
    with GGUFFile(tmp_path / "file.gguf") as file:
        said = {key: value for key, value in file.metadata.items() if key.startswith("quantize.")}
    assert said == {
        "quantize.imatrix.file": "m.gguf",
        "quantize.imatrix.dataset": "calibration.txt",
        "quantize.imatrix.entries_count": 28,
        "quantize.imatrix.chunks_count": 8,
    }
    with GGUFFile(tmp_path / "text.gguf") as file:
        assert "quantize.imatrix.file" not in file.metadata
        assert file.metadata["quantize.imatrix.dataset"] == "calibration.txt"


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q6_k"])
def test_the_weighted_error_is_lower(kind, matrix, shipped, exported, tmp_path):
    export_gguf(shipped, tmp_path / "m.gguf", kind, pure=True, imatrix=matrix)
    original = load_file(shipped / "model.safetensors")
    errors = []
    with GGUFFile(tmp_path / "m.gguf") as weighted, GGUFFile(exported(kind, pure=True)) as plain:
        names = weighted.architecture.names(
            json.loads((shipped / "config.json").read_text()) | {"attention_bias": True}
        )
        for name, weight in original.items():
            importance = matrix.importance(names[name], tuple(weight.shape))
            if importance is None:
                assert torch.equal(weighted[names[name]].raw, plain[names[name]].raw)
                continue
            errors.append(
                [
                    float(((file[names[name]].decode() - weight.float()).square() * importance).sum())
                    for file in (weighted, plain)
                ]
            )
    assert len(errors) == 28
    ours, without = torch.tensor(errors).T
    assert bool((ours < without).all())


def test_each_matrix_of_a_stack_has_its_own_importance(tmp_path, monkeypatch):
    monkeypatch.setattr("qkern.gguf.writer._CHUNK_BYTES", 4 * 64 * 3)  # three rows a chunk
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 5, 64, generator=generator)
    importance = torch.rand(3, 64, generator=generator).square()
    importance[1] = 0
    planned = PlannedTensor(
        name="t",
        source="t",
        type=gguf_type("q4_0"),
        shape=(3, 5, 64),
        read=lambda: stack,
        importance=importance,
    )
    write_gguf(tmp_path / "x.gguf", "none", [planned], lambda writer: None)
    expected = [gguf_encode(stack[i], "q4_0", importance=importance[i]) for i in (0, 2)]
    expected.insert(1, gguf_encode(stack[1], "q4_0"))
    assert torch.equal(raw(tmp_path / "x.gguf")["t"], torch.stack(expected).flatten())


def test_blocks_of_the_wrong_size_are_refused(tmp_path):
    planned = PlannedTensor(
        name="t",
        source="a.weight",
        type=gguf_type("q4_0"),
        shape=(5, 64),
        read=lambda: torch.ones(5, 64),
        blocks=lambda: gguf_encode(torch.ones(4, 64), "q4_0"),
    )
    with pytest.raises(
        InputError, match=r"blocks of a\.weight must be uint8 \(5, 36\): got torch.uint8 \(4, 36\)"
    ):
        write_gguf(tmp_path / "x.gguf", "none", [planned], lambda writer: None)
    assert list(tmp_path.iterdir()) == []


def without(matrix, *names, **changes):
    entries = {name: entry for name, entry in matrix.entries.items() if name not in names}
    return replace(matrix, entries=entries | changes)


def test_what_has_no_importance_is_named(matrix, shipped, exported, tmp_path, caplog):
    gone, dark = "blk.1.ffn_down.weight", "blk.2.attn_q.weight"
    entry = matrix.entries[dark]
    zero = ImatrixEntry(sums=torch.zeros_like(entry.sums), counts=entry.counts)
    changed = without(matrix, gone, **{dark: zero, "blk.9.attn_q.weight": entry})
    caplog.set_level(logging.WARNING)
    export_gguf(shipped, tmp_path / "m.gguf", "q4_0", pure=True, imatrix=changed)
    assert [record.getMessage() for record in caplog.records] == [
        f"the importance matrix has no entry for {gone}: quantized with all columns alike",
        f"no token of the importance matrix reached {dark}: quantized with all columns alike",
        "1 entries of the importance matrix are of no tensor of the model: blk.9.attn_q.weight",
    ]
    ours, plain = raw(tmp_path / "m.gguf"), raw(exported("q4_0", pure=True))
    same = {name for name in ours if torch.equal(ours[name], plain[name])}
    assert {gone, dark} <= same
    assert "blk.0.ffn_down.weight" not in same


def test_experts_that_no_token_reached_are_named(caplog):
    from qkern.pipelines.imatrix import with_importance

    counts = torch.tensor([3, 0, 2, 0])
    entry = ImatrixEntry(sums=torch.ones(4, 64) * counts[:, None], counts=counts)
    planned = PlannedTensor(
        name="blk.0.ffn_up_exps.weight",
        source="experts",
        type=gguf_type("q4_0"),
        shape=(4, 8, 64),
        read=lambda: torch.ones(4, 8, 64),
    )
    matrix = Imatrix(entries={planned.name: entry}, chunk_count=1, chunk_size=8)
    caplog.set_level(logging.WARNING)
    with_importance([planned], matrix)
    assert "blk.0.ffn_up_exps.weight (expert 1, 3): quantized with all columns alike" in caplog.text


def test_an_importance_matrix_of_another_model_is_refused(matrix, shipped, exported, tmp_path):
    entry = matrix.entries["blk.0.attn_q.weight"]
    wide = ImatrixEntry(sums=torch.ones(1, 512), counts=entry.counts)
    stranger = {"blk.0.ssm_in.weight": entry}
    for other, message in (
        (
            without(matrix, **{"blk.0.attn_q.weight": wide}),
            r"blk\.0\.attn_q\.weight is \(256, 256\), .* 1 x 512",
        ),
        (
            replace(matrix, entries=stranger),
            r"it has blk\.0\.ssm_in\.weight, the model has",
        ),
    ):
        with pytest.raises(InputError, match=f"made for another model: {message}"):
            export_gguf(shipped, tmp_path / "m.gguf", imatrix=other)
    with pytest.raises(FormatError, match=r"is a GGUF, but no importance matrix: general\.type is"):
        export_gguf(shipped, tmp_path / "m.gguf", imatrix=exported("q4_0"))
    with pytest.raises(InputError, match="give one"):
        export_gguf(shipped, tmp_path / "m.gguf", imatrix=matrix, calibration=shipped / "calibration.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_checkpoint_takes_a_file_but_no_calibration(matrix, shipped, tmp_path):
    qkern.quantize(shipped, method="rtn", scheme="w8", output=tmp_path / "w8")
    export_gguf(tmp_path / "w8", tmp_path / "m.gguf", imatrix=matrix)
    with pytest.raises(InputError, match="already quantized"):
        export_gguf(tmp_path / "w8", tmp_path / "n.gguf", calibration=shipped / "calibration.txt")


def test_command_line(matrix, shipped, tmp_path, capsys):
    from qkern.cli import main

    write_imatrix(tmp_path / "m.dat", matrix)
    text = shipped / "calibration.txt"
    options = ["--samples", "8", "--length", "128"]
    for name, source in (
        ("file", ["--imatrix", tmp_path / "m.dat"]),
        ("text", ["--calibration", text, *options]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export-gguf", str(shipped), "--output", str(tmp_path / f"{name}.gguf"), *map(str, source)])
        assert stop.value.code == 0
    ours, theirs = raw(tmp_path / "file.gguf"), raw(tmp_path / "text.gguf")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    both = ["--imatrix", tmp_path / "m.dat", "--calibration", text]
    with pytest.raises(SystemExit) as stop:
        main(["export-gguf", str(shipped), "--output", str(tmp_path / "n.gguf"), *map(str, both)])
    assert stop.value.code == 1
    assert "give one (--calibration FILE or --imatrix FILE)" in capsys.readouterr().err
