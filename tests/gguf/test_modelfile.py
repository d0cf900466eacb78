"""Ollama's Modelfile says what the model's own files say, and no more."""

import json
import logging
from pathlib import Path

import pytest

from qkern.errors import FormatError, InputError, OutputError
from qkern.gguf.modelfile import ollama_modelfile
from qkern.pipelines import export_gguf

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% elif message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
COUNTING = "{% for message in messages %}{{ loop.index }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def chat_folder(shipped, tmp_path):
    """Maker of folders with the shipped tokenizer and a chat template."""
    from transformers import AutoTokenizer

    def make(template, generation=None):
        tokenizer = AutoTokenizer.from_pretrained(shipped)
        tokenizer.chat_template = template
        folder = tmp_path / "model"
        tokenizer.save_pretrained(folder)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder, tokenizer

    return make


def go(template, messages):
    """Run a template of the form that is written, as Go's text/template does."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    opening, loop = template.split("{{ range $number, $_ := .Messages }}")
    text = opening
    if opening.startswith("{{ if .System }}"):
        given, absent = opening.removeprefix("{{ if .System }}").removesuffix("{{ end }}").split("{{ else }}")
        text = given.replace("{{ .System }}", system[0]) if system else absent
    user, assistant = loop.split('{{ else if eq .Role "assistant" }}{{ .Content }}')
    user = user.partition('{{ if eq .Role "user" }}{{ .Content }}{{ if $last }}')[2].removesuffix("{{ end }}")
    end, reply = user.split("{{ else }}")
    question = assistant.removeprefix("{{ if not $last }}").removesuffix("{{ end }}{{ end }}{{ end }}")
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if message["role"] == "user":
            text += message["content"] + (end if last else reply)
        elif message["role"] == "assistant":
            text += message["content"] + ("" if last else question)
    return text


def parts_of(modelfile):
    head, template, tail = modelfile.split('"""')
    assert head == "FROM ./m.gguf\nTEMPLATE "
    return template, tail.strip().splitlines()


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, NO_SYSTEM], ids=["chatml", "default", "none"])
def test_the_template_writes_what_the_chat_template_writes(template, chat_folder):
    folder, tokenizer = chat_folder(template)
    text, _ = parts_of(ollama_modelfile(folder, "m.gguf"))
    talk = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Adam."},
        {"role": "user", "content": "Where?"},
    ]
    system = {"role": "system", "content": "Be brief."}
    for messages in ([talk[0]], talk, [system, talk[0]], [system, *talk]):
        if template is NO_SYSTEM and messages[0] is system:
            continue
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert go(text, messages) == expected
    assert (".System" in text) == (template is not NO_SYSTEM)


@pytest.mark.parametrize(
    "template", [COUNTING, CHATML + "{{ strftime_now('%Y') }}", CHATML + "{{ '{{' }}", None]
)
def test_a_template_that_is_not_of_turns_is_left_out(template, chat_folder, caplog):
    folder, _ = chat_folder(template)
    with caplog.at_level(logging.WARNING):
        assert "TEMPLATE" not in ollama_modelfile(folder, "m.gguf")
    assert ("no TEMPLATE" in caplog.text) == (template is not None)


def test_parameters_are_those_of_the_generation_config(chat_folder):
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "eos_token_id": [0, 1],
    }
    folder, tokenizer = chat_folder(CHATML, generation)
    first, second = (json.dumps(token) for token in tokenizer.convert_ids_to_tokens([0, 1]))
    _, lines = parts_of(ollama_modelfile(folder, "m.gguf"))
    assert lines == [
        f"PARAMETER stop {first}",
        f"PARAMETER stop {second}",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.8",
        "PARAMETER repeat_penalty 1.05",
    ]
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    _, lines = parts_of(ollama_modelfile(folder, "m.gguf"))
    assert lines == [f"PARAMETER stop {json.dumps(tokenizer.eos_token)}"]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"generation_config.json cannot be read"):
        ollama_modelfile(folder, "m.gguf")


def test_stops_are_text_as_it_is_written(chat_folder):
    folder, tokenizer = chat_folder(CHATML)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    (word,) = (number for token, number in tokenizer.get_vocab().items() if token == "Ġthe")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [newline, word]}))
    _, lines = parts_of(ollama_modelfile(folder, "m.gguf"))
    assert lines == ['PARAMETER stop "\\n"', 'PARAMETER stop " the"']


@pytest.mark.parametrize("stop", [999999, -1, 2**40, True, "a", [0]])
def test_a_stop_that_is_no_token_is_refused(stop, chat_folder):
    folder, _ = chat_folder(CHATML, {"eos_token_id": [0, stop]})
    with pytest.raises(FormatError, match=r"generation_config\.json"):
        ollama_modelfile(folder, "m.gguf")


def test_a_full_disk_leaves_no_half_of_it(shipped, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write .*Modelfile: No space left on device; .*free space"):
        export_gguf(shipped, tmp_path / "m.gguf", "q4_0", modelfile=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_it_is_written_beside_the_file(shipped, tmp_path):
    export_gguf(shipped, tmp_path / "m.gguf", "q4_0", modelfile=True)
    assert (tmp_path / "Modelfile").read_text() == ollama_modelfile(shipped, "m.gguf")
    with pytest.raises(InputError, match=r"Modelfile must end in \.gguf"):
        export_gguf(shipped, tmp_path / "Modelfile", "q4_0", modelfile=True)
    with pytest.raises(InputError, match="Modelfile exists"):
        export_gguf(shipped, tmp_path / "other.gguf", "q4_0", modelfile=True)
    with pytest.raises(InputError, match="Ollama reads one file"):
        export_gguf(shipped, tmp_path / "other.gguf", "q4_0", modelfile=True, max_shard_size="1MB")
    assert not (tmp_path / "other.gguf").exists()
