"""Calibration sources: what is read, and the one error for each that cannot be."""

import json
import sys
import types

import pytest
import torch

from qkern.calibration import load_texts
from qkern.errors import FormatError, InputError


class ChatTokenizer:
    """Counts characters as tokens; its chat template marks the roles."""

    chat_template = "template"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(c) for c in text]
        return {"input_ids": ([1] if add_special_tokens else []) + ids}


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo ü\n", encoding="utf-8")
    assert load_texts(path) == ["one\n\ntwo ü\n"]
    assert load_texts(str(path)) == ["one\n\ntwo ü\n"]


def test_jsonl_of_texts_and_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "plain"}, {"messages": [{"role": "user", "content": "hi"}]}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    # The template has the special tokens, so none are added.
    assert load_texts(path, tokenizer=ChatTokenizer()) == ["plain", [ord(c) for c in "<user>hi"]]


def test_messages_need_a_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(InputError, match=r"line 1 holds chat messages.*no chat template"):
        load_texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{oops", "line 2 is not JSON"), ('{"prompt": 1}', "line 2 has neither"), ("[1]", "line 2 has neither")],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(FormatError, match=message):
        load_texts(path)


def test_messages_that_the_template_refuses(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"content": "no role"}]}')
    with pytest.raises(FormatError, match="line 1: the chat template"):
        load_texts(path, tokenizer=ChatTokenizer())


def test_lists_of_texts_and_ids():
    assert load_texts(["a", "b"]) == ["a", "b"]
    assert load_texts([[1, 2], (3,), torch.tensor([4, 5])]) == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize("entry", [1.5, [1.0], [-1], {"text": "a"}, None])
def test_other_entries_are_refused(entry):
    with pytest.raises(InputError, match="entry 1 is neither"):
        load_texts(["a", entry])


@pytest.mark.parametrize("source", [5, {"text": "a"}])
def test_another_type(source):
    with pytest.raises(InputError, match=f"no source of texts: got {type(source).__name__}; give a .txt"):
        load_texts(source)


@pytest.mark.parametrize("source", [[], ["", "  \n"], [[]]])
def test_empty_list(source):
    with pytest.raises(InputError, match="empty"):
        load_texts(source)


def test_empty_and_missing_files(tmp_path):
    empty = tmp_path / "a.txt"
    empty.write_text("  \n")
    with pytest.raises(InputError, match=r"calibration text is empty: got .*a\.txt"):
        load_texts(empty)
    for missing in (tmp_path / "b.txt", "calibration.jsonl", "./relative", tmp_path):
        with pytest.raises(InputError, match=r"calibration file not found|is a folder"):
            load_texts(missing)


def test_binary_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not UTF-8"):
        load_texts(path)


def test_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="'datasets' package, which is not installed"):
        load_texts("owner/corpus")


def test_dataset_by_name(monkeypatch):
    calls = []

    class Rows(list):
        def take(self, count):
            return self[:count]

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "bad":
            raise ConnectionError("no route")
        return Rows([{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("owner/corpus:small:test") == ["a", "b"]
    assert load_texts("owner/corpus") == ["a", "b"]
    assert calls == [("owner/corpus", "small", "test", True), ("owner/corpus", None, "train", True)]
    with pytest.raises(InputError, match="'bad' cannot be loaded: no route"):
        load_texts("bad")


def test_a_line_of_jsonl_ends_at_its_newline_only(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028line", "and\x85another"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))  # as some editors save it
    assert load_texts(path) == texts
