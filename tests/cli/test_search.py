"""`qkern sensitivity` and `qkern search`: arguments arrive, tables and JSON on stdout, files are whole."""

import json

import pytest
import torch

from qkern import cli
from qkern.search import MixedPrecision

ALLELES = ("--alleles", "w2g16, w4g32,w8")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = torch.randint(26, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(chr(97 + i) for i in letters))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_sensitivity_prints_and_plots(capsys, folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("sensitivity", folder, "--calibration", text, *ALLELES, "--length", 32, "--tokens", 64)
    arguments += ("--store", tmp_path / "store")
    code, out, err = run(
        capsys, *arguments, "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--allele", "w4g32"
    )
    assert code == 0, err
    assert "KL in nats with one of them in w4g32, the others 16-bit" in out
    assert "q_proj" in out
    assert "4.500" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "a.json").read_text())
    assert {tuple(gene["kl"]) for gene in report["genes"]} == {("w2g16", "w4g32", "w8")}
    assert "sensitivity: change 42/42" in err
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["genes"] == report["genes"]
    assert "sensitivity: change" not in err  # the store knows them
    code, _, err = run(capsys, *arguments, "--allele", "w3")
    assert (code, "no linear has the choice 'w3': there are w2g16, w4g32, w8" in err) == (1, True)
    default = [part for part in arguments if part not in ALLELES]
    code, out, err = run(capsys, *default, "--allele", "w3g16")
    assert (code, "no linear had the choice 'w3g16': there are w2g" in err) == (0, True)
    assert "one of them in its smallest choice" in out
    code, _, err = run(capsys, *arguments, "--plot", tmp_path / "a.png")
    assert (code, "a.png exists" in err) == (1, True)
    code, _, err = run(capsys, *arguments, "--output", tmp_path / "b.png", "--plot", tmp_path / "b.png")
    assert (code, "--output and --plot are both" in err) == (1, True)
    within = tmp_path / "store" / "a.png"
    code, _, err = run(capsys, *arguments, "--store", tmp_path / "store", "--plot", within)
    assert (code, "--store and --plot are one inside the other" in err) == (1, True)
    code, _, err = run(capsys, *arguments, "--plot", tmp_path / "a.txt")
    assert (code, "is no picture: its name ends in .png" in err) == (1, True)


def test_search_and_the_command_it_names(capsys, folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    common = (folder, "--calibration", text, *ALLELES, "--length", 32, "--tokens", 64, "--method", "rtn")
    output = tmp_path / "a.json"
    code, out, err = run(
        capsys,
        *("search", *common, "--target-bpw-linear", 4, "--population", 4, "--generations", 2),
        *("--output", output),
    )
    assert code == 0, err
    for word in ("genetic", "lagrangian", "greedy", "random", "uniform w2g16", "4 bits a weight"):
        assert word in out
    assert "generation 2 of 2: best" in err
    assignment = MixedPrecision.read(output)
    assert len(assignment.choices) == 14
    (command,) = [line for line in out.splitlines() if line.startswith("next: qkern ")]
    words = command.removeprefix("next: qkern ").replace("OUTPUT", str(tmp_path / "out")).split()
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "mixed" in out
    code, out, err = run(
        capsys,
        *("search", *common, "--pareto", "--population", 4, "--generations", 2),
        *("--output", tmp_path / "front", "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["best"] is None
    points = [point for point in report["others"] if point["found_by"] == "pareto"]
    assert len(points) == len(list((tmp_path / "front").glob("0*.json")))


@pytest.mark.parametrize("samples", [4, 128])
def test_the_command_that_it_names_writes_the_codes_that_it_scored(capsys, folder, text, tmp_path, samples):
    common = (folder, "--calibration", text, "--length", 32, "--tokens", 64, "--samples", samples)
    output = tmp_path / "a.json"
    few = ("--population", 4, "--generations", 1, "--finalists", 1, "--output", output)
    code, out, err = run(capsys, "search", *common, *ALLELES, "--target-bpw-linear", 4, *few)
    assert code == 0, err
    (command,) = [line for line in out.splitlines() if line.startswith("next: qkern ")]
    words = command.removeprefix("next: qkern ").replace("OUTPUT", str(tmp_path / "out")).split()
    left = int(words[words.index("--samples") + 1])
    assert ("the calibration text is short" in out) == (left < samples) == (samples == 128)
    code, out, err = run(capsys, *words)
    assert code == 0, err
    shape = json.loads((tmp_path / "out" / "qkern.json").read_text())["calibration"]["shape"]
    assert shape == [left, 32]


def test_mistakes_are_told(capsys, folder, text, tmp_path):
    common = (
        "search",
        folder,
        "--calibration",
        text,
        "--length",
        32,
        "--output",
        tmp_path / "a.json",
        *ALLELES,
    )
    code, _, err = run(capsys, *common)
    assert (code, "needs one target" in err) == (1, True)
    code, _, err = run(capsys, *common, "--target-bpw-linear", 1)
    assert (code, "no assignment is as small as 1 bits" in err) == (1, True)
    code, _, err = run(capsys, *common, "--target-bpw-linear", 4, "--text", "/none.txt")
    assert (code, "text (--text): search file not found: /none.txt" in err) == (1, True)
    code, _, err = run(capsys, *common, "--target-bpw", 3, "--runtime", "exl3")
    assert (code, "'exl3' is not one of" in err) == (2, True)
    one = tmp_path / "one.txt"
    one.write_text("a")
    code, _, err = run(capsys, *("search", folder, "--calibration", one, "--target-bpw-linear", 4, *ALLELES),
                       *("--output", tmp_path / "a.json"))  # fmt: skip
    assert (code, "calibration text is shorter than one sequence: it has 1 tokens" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]
