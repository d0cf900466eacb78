"""Calibration documents from a file, a list or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from qkern.errors import FormatError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Document", "check_source", "load_texts"]

# What is certainly meant as a file; other names may be data sets.
_SUFFIXES: Final = (".txt", ".jsonl", ".json", ".md")

# A text, or token ids that are taken as they are.
Document: TypeAlias = "str | list[int]"

_ALLOWED: Final = (
    "a .txt file, a .jsonl file with a 'text' or 'messages' field a line, a list of texts, a list of lists "
    "of token ids, or the name of a Hugging Face dataset (name, name:config or name:config:split)"
)


def check_source(source: Any, what: str = "calibration") -> None:
    """Refuse what can be no source of texts, before a tokenizer is looked for; errors call it `what`.

    Raises
    ------
    InputError
        That names its type.
    """
    if isinstance(source, Mapping) or not isinstance(source, Iterable | Path):
        raise InputError(f"{what} is no source of texts: got {type(source).__name__}; give {_ALLOWED}")


def load_texts(
    source: str | Path | Sequence[Any], *, tokenizer: Any = None, what: str = "calibration"
) -> list[Document]:
    """Read calibration documents.

    Parameters
    ----------
    source : str, Path or sequence
        A ``.jsonl`` file with ``{"text": ...}`` or ``{"messages": [...]}`` a line; any other file: one
        document of plain text; a list of str; a list of lists of token ids; else the name of a Hugging
        Face dataset, ``name[:config[:split]]`` (split ``train`` by default), if `datasets` is installed.
    tokenizer : PreTrainedTokenizer, optional
        Needed for ``messages``: they go through its chat template.
    what : str
        What errors call the texts.

    Returns
    -------
    list of str or list of int
        Documents that are not empty.

    Raises
    ------
    InputError
        If the source does not exist, is of another kind, or holds no text.
    FormatError
        If a JSONL line is not as described.
    """
    check_source(source, what)
    if isinstance(source, (str, Path)):
        documents = _from_name(source, tokenizer, what)
    else:
        documents = [_document(entry, position, what) for position, entry in enumerate(source)]
    kept = [
        document for document in documents if (document.strip() if isinstance(document, str) else document)
    ]
    if not kept:
        got = f"{source}" if isinstance(source, (str, Path)) else f"a list of {len(documents)} entries"
        raise InputError(f"{what} text is empty: got {got}; give {_ALLOWED}")
    return kept


def _from_name(source: str | Path, tokenizer: Any, what: str) -> list[Document]:
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{what} file {path} is not UTF-8 text ({error}); allowed is {_ALLOWED}"
            ) from error
        return _from_jsonl(path, text, tokenizer) if path.suffix in (".jsonl", ".json") else [text]
    file_like = path.is_absolute() or path.suffix in _SUFFIXES or str(source).startswith(".")
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give {_ALLOWED}")
    if file_like:
        raise InputError(f"{what} file not found: {path}; give {_ALLOWED}")
    return _from_dataset(str(source), tokenizer, what)


def _from_jsonl(path: Path, text: str, tokenizer: Any) -> list[Document]:
    documents: list[Document] = []
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FormatError(
                f"{path} line {number} is not JSON ({error}); a .jsonl file holds one object a line"
            ) from error
        documents.append(_from_row(row, f"{path} line {number}", tokenizer))
    return documents


def _from_row(row: Any, where: str, tokenizer: Any) -> Document:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{where} holds chat messages, but the model's tokenizer has no chat template: "
                "give plain text in a 'text' field"
            )
        try:
            rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except Exception as error:  # a template raises whatever its author chose
            raise FormatError(f"{where}: the chat template does not take these messages: {error}") from error
        ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise FormatError(f"{where} has neither a 'text' string nor a 'messages' list: got {keys}")


def _document(entry: Any, position: int, what: str) -> Document:
    if isinstance(entry, str):
        return entry
    values: Iterable[Any] = entry.tolist() if hasattr(entry, "tolist") else entry
    if isinstance(values, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in values):
        return list(values)
    raise InputError(
        f"{what} entry {position} is neither a text nor a list of token ids: got "
        f"{type(entry).__name__}; give {_ALLOWED}"
    )


def _from_dataset(name: str, tokenizer: Any, what: str) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{what} {name!r} is not a file, and as the name of a Hugging Face dataset it needs the "
            "'datasets' package, which is not installed: pip install datasets, or give a file"
        ) from None
    base, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(base, config or None, split=split or "train", streaming=True)
        # More documents than any calibration reads; streaming stops the download there.
        return [_from_row(row, f"dataset {name}", tokenizer) for row in rows.take(20_000)]
    except (FormatError, InputError):
        raise
    except Exception as error:  # hub, network and builder errors share no base class
        raise InputError(f"{what} dataset {name!r} cannot be loaded: {error}") from error
