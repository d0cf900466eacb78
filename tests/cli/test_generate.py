import pytest

import qkern
from qkern import InputError, cli
from qkern.demo import MODEL

PROMPT = "In the beginning"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", *map(str, arguments)])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from transformers import AutoTokenizer

    return qkern.load(MODEL), AutoTokenizer.from_pretrained(MODEL)


def greedy(model_and_tokenizer, inputs, tokens):
    model, tokenizer = model_and_tokenizer
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text(capsys, model_and_tokenizer):
    code, out, _ = run(capsys, MODEL, "--prompt", PROMPT, "--max-tokens", 8)
    expected = greedy(model_and_tokenizer, model_and_tokenizer[1](PROMPT, return_tensors="pt"), 8)
    assert (code, out) == (0, expected + "\n")


def test_a_device_that_is_unknown(capsys):
    code, out, err = run(capsys, MODEL, "--prompt", PROMPT, "--device", "gpu0")
    assert (code, out) == (1, "")
    assert "device 'gpu0' cannot be used here" in err


def test_chat_uses_the_template(capsys, model_and_tokenizer):
    code, out, _ = run(capsys, MODEL, "--prompt", PROMPT, "--chat", "--max-tokens", 4)
    inputs = model_and_tokenizer[1].apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert (code, out) == (0, greedy(model_and_tokenizer, inputs, 4) + "\n")


def test_seed_decides_the_sample(capsys):
    arguments = (MODEL, "--prompt", PROMPT, "--max-tokens", 12, "--temperature", 1.5)
    first, again, other = (run(capsys, *arguments, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_text_arrives_in_pieces(capsys, monkeypatch):
    pieces = []
    real = cli.generate.typer.echo
    monkeypatch.setattr(
        cli.generate.typer, "echo", lambda text, **kw: (pieces.append(text), real(text, **kw))
    )
    _, out, _ = run(capsys, MODEL, "--prompt", PROMPT, "--max-tokens", 8)
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces) + "\n" == out


def test_errors(capsys):
    code, out, err = run(capsys, MODEL, "--prompt", "")
    assert (code, out) == (1, "")
    assert "the prompt has no tokens" in err
    code, _, err = run(capsys, "no-such-folder-here", "--prompt", PROMPT)
    assert code == 1
    assert "no-such-folder-here" in err.splitlines()[-1]


def test_folder_without_a_tokenizer(capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    code, out, err = run(capsys, tmp_path, "--prompt", PROMPT)
    assert (code, out) == (1, "")
    assert f"{tmp_path} has no tokenizer: one of tokenizer.json" in err


def test_chat_without_a_template():
    class Plain:
        chat_template = None

    with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
        cli.generate._encode(Plain(), PROMPT, True)
