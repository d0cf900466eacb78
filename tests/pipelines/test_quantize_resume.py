"""A killed run goes on where it stopped and gives the same bytes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qkern.errors import InputError, QkernError, UnsupportedError
from qkern.pipelines import partial, quantize
from qkern.pipelines import quantize as quantize_function

IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
module = sys.modules[quantize_function.__module__]

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from qkern.pipelines import partial, quantize
save = partial.Partial.save

def save_and_die(self, name, finished):
    save(self, name, finished)
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

partial.Partial.save = save_and_die
ids = torch.tensor(eval(sys.argv[4]))
quantize(sys.argv[1], output=sys.argv[2], calibration=ids, scheme="w4g32z", method="awq", include=["lm_head"])
"""
OPTIONS = {"calibration": IDS, "scheme": "w4g32z", "method": "awq", "include": ["lm_head"]}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", dtype=torch.bfloat16, num_hidden_layers=3).save_pretrained(path)
    return path


@pytest.fixture
def layers_done(monkeypatch):
    """Indices of the layers that are quantized, not read back."""
    done = []
    original = module.quantize_layer

    def counted(stream, structure, index, *rest):
        done.append(index)
        return original(stream, structure, index, *rest)

    monkeypatch.setattr(module, "quantize_layer", counted)
    return done


@pytest.fixture
def stop_after(monkeypatch):
    """Ends a run with Ctrl-C once the named layer is kept."""

    def arm(last):
        save = module.Partial.save

        def save_and_stop(self, name, finished):
            save(self, name, finished)
            if name == last:
                monkeypatch.setattr(module.Partial, "save", save)
                raise KeyboardInterrupt

        monkeypatch.setattr(module.Partial, "save", save_and_stop)

    return arm


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path, layers_done):
    quantize(folder, output=tmp_path / "whole", **OPTIONS)
    assert layers_done == [0, 1, 2]
    layers_done.clear()
    output = tmp_path / "out"
    arguments = [str(folder), str(output), "layer-00001", repr(IDS.tolist())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    quantize(folder, output=output, **OPTIONS)
    assert layers_done == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("last", ["layer-00000", "layer-00002", "head"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_every_stop_leads_to_the_same_bytes(folder, tmp_path, layers_done, stop_after, last, method):
    options = {**OPTIONS, "method": method}
    quantize(folder, output=tmp_path / "whole", **options)
    stop_after(last)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    layers_done.clear()
    quantize(folder, output=tmp_path / "out", **options)
    assert layers_done == ([1, 2] if last == "layer-00000" else [])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_run_does_not_use_the_layers(folder, tiny, tmp_path, stop_after, layers_done):
    output = tmp_path / "out"
    stop_after("layer-00001")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=output, **OPTIONS)
    for change in (
        {"scheme": "w3g32z"},
        {"method": "gptq"},
        {"calibration": IDS.flip(0)},
        {"skip": ["up_proj"]},
    ):
        with pytest.raises(InputError, match=r"holds finished layers of another run.*resume=False"):
            quantize(folder, output=output, **{**OPTIONS, **change})
    other = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=3, seed=1)
    with pytest.raises(InputError, match=r"another run \(of a model with other weights"):
        quantize(other, output=output, **OPTIONS)
    # Another format is another way to write the same layers.
    layers_done.clear()
    report = quantize(folder, output=output, **OPTIONS, format="compressed-tensors")
    assert layers_done == [2]
    assert report.format == "compressed-tensors"


def test_a_format_that_turns_out_not_to_fit_costs_no_work(tiny, tmp_path, layers_done):
    model = tiny("llama")
    with torch.no_grad():
        # All weights of a group positive: its zero point is 0, which GPTQ v1 cannot store.
        model.model.layers[1].mlp.up_proj.weight.abs_()
    options = {"method": "rtn", "scheme": "w4g32z", "output": tmp_path / "out"}
    message = r"layers\.1\.mlp\.up_proj: .*zero point of 0.*gptq_v2.*kept in .*out\.partial.*--format"
    with pytest.raises(UnsupportedError, match=message):
        quantize(model, **options, format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert layers_done == [0, 1]
    quantize(model, **options, format="gptq_v2")
    assert layers_done == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_with_the_same_output_is_refused(folder, tmp_path, monkeypatch, resume):
    quantize(folder, output=tmp_path / "whole", method="rtn", scheme="w4g32")
    original, refused = module.quantize_layer, []

    def meanwhile(*arguments):
        done = original(*arguments)
        with pytest.raises(InputError, match=r"another run is at work in .*out\.partial: wait") as info:
            quantize(folder, output=tmp_path / "out", method="rtn", scheme="w4g32", resume=resume)
        refused.append(info)
        return done

    monkeypatch.setattr(module, "quantize_layer", meanwhile)
    quantize(folder, output=tmp_path / "out", method="rtn", scheme="w4g32")
    assert len(refused) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_folder_that_a_run_took_with_it_is_not_held(tmp_path, monkeypatch):
    flock = partial.fcntl.flock

    def late(file, how):
        (tmp_path / "out.partial" / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(partial.fcntl, "flock", late)
    with pytest.raises(InputError, match="another run"):
        partial.Partial(tmp_path / "out.partial", {})


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(partial.fcntl, "flock", unsupported)
    with partial.Partial(tmp_path / "out.partial", {"method": "rtn"}):
        pass
    assert "out.partial cannot be locked (Operation not supported)" in caplog.text


def test_no_resume_starts_afresh(folder, tmp_path, stop_after, layers_done):
    output = tmp_path / "out"
    stop_after("layer-00001")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=output, **OPTIONS)
    layers_done.clear()
    quantize(folder, output=output, **{**OPTIONS, "scheme": "w3g32"}, resume=False)
    assert layers_done == [0, 1, 2]
    assert not (tmp_path / "out.partial").exists()


def test_no_resume_empties_no_folder_of_others(folder, tmp_path, stop_after):
    stop_after("layer-00001")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=tmp_path / "out", **OPTIONS)
    (tmp_path / "out.partial" / "mine").mkdir()
    with pytest.raises(InputError, match=r"cannot empty .*out\.partial: .*mine: .*; remove it yourself"):
        quantize(folder, output=tmp_path / "out", **OPTIONS, resume=False)


def test_a_model_in_memory_resumes_too(tiny, tmp_path, stop_after, layers_done):
    model = tiny("gpt2", num_hidden_layers=3)
    options = {"calibration": IDS, "scheme": "w4g32"}
    quantize(model, output=tmp_path / "whole", **options)
    stop_after("layer-00000")
    with pytest.raises(KeyboardInterrupt):
        quantize(model, output=tmp_path / "out", **options)
    layers_done.clear()
    quantize(model, output=tmp_path / "out", **options)
    assert layers_done == [1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_layer_is_an_error(folder, tmp_path, stop_after):
    output = tmp_path / "out"
    stop_after("layer-00001")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=output, **OPTIONS)
    path = tmp_path / "out.partial" / "layer-00001.safetensors"
    whole = path.read_bytes()
    for facts in ("{}", "[]", "[" * 100_000, '{"weights": {"a": 1}}', '{"weights": {"a": ["w4", [2, 2]]}}'):
        save_file({"a": torch.zeros(1)}, path, metadata={"facts": facts})
        with pytest.raises(QkernError, match=r"layer-00001\.safetensors is damaged .* remove it"):
            quantize(folder, output=output, **OPTIONS)
    path.write_bytes(whole[:-7])
    with pytest.raises(QkernError, match=r"layer-00001\.safetensors is damaged"):
        quantize(folder, output=output, **OPTIONS)


def test_an_interrupt_before_the_first_layer_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, output=tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_recipe_has_no_time_in_it(folder, tmp_path):
    quantize(folder, output=tmp_path / "out", method="rtn", scheme="w4g32")
    recipe = json.loads((tmp_path / "out" / "qkern.json").read_text())
    assert "seconds" not in json.dumps(recipe)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_only_has_the_name_is_left_alone(folder, tmp_path, resume):
    stranger = tmp_path / "out.partial"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.partial.*not from a run of qkern.*move it away"):
        quantize(folder, output=tmp_path / "out", method="rtn", scheme="w4g32", resume=resume)
    assert (stranger / "notes.txt").read_text() == "mine"
    (stranger / "notes.txt").rename(stranger / ".run.json.tmp")  # all that a run killed at once leaves
    quantize(folder, output=tmp_path / "out", method="rtn", scheme="w4g32", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
