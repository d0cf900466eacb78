"""What lies in a folder beside the tensors that are read: recipe, tokenizer, further tensor files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qkern.calibration import has_tokenizer, load_tokenizer
from qkern.checkpoints import RECIPE_NAME
from qkern.errors import FormatError
from qkern.pipelines.history import KEY, parse_grids
from qkern.pipelines.verification.safetensors_files import read_json_object

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qkern.pipelines.history import Grid
    from qkern.pipelines.verification.report import Findings

__all__ = ["check_strays", "compare_tokenizers", "grids_of", "tokenizer_of"]

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")
# Rows of an embedding without a token, as converters to GGUF name them.
_UNUSED: Final = re.compile(r"\[PAD\d+\]")
# Words, case, numbers, spaces, lines, code, scripts: what tokenizers treat each in their own way.
_SAMPLE: Final = (
    "And the King said: It's 1,234.5 km away!  Isn't that far?\n\tdef f(x):\n        return x**2  # ok\n"
    "Größe, naïve, Привет, 你好世界, 🙂"
)


def grids_of(folder: Path, findings: Findings) -> dict[str, tuple[Grid, ...]]:
    """Grids that matrices passed, as ``qkern.json`` has them; it need not be there."""
    file = folder / RECIPE_NAME
    if not file.exists():
        return {}
    recipe, problem = read_json_object(file)
    if problem is None:
        try:
            return parse_grids(recipe.get(KEY, {}), f"{KEY} of {RECIPE_NAME}")
        except FormatError as error:
            problem = str(error)
    findings.add("config", problem)
    return {}


def check_strays(folder: Path, read: Iterable[Path], findings: Findings) -> None:
    """Note tensor files that are not read, of which other readers may take some."""
    strays = sorted({file.name for file in folder.glob("*.safetensors")} - {file.name for file in read})
    if strays and not findings.has("files"):
        findings.note(
            "files",
            f"{', '.join(strays)} beside the files of the model: qkern does not read them, others may",
        )


def tokenizer_of(folder: Path, rows: int, findings: Findings) -> Any:
    """Return the tokenizer of a folder; None if there is none, or it is not read here."""
    for name in _TOKENIZER_FILES:
        _, problem = read_json_object(folder / name) if (folder / name).exists() else ({}, None)
        if problem is not None:
            findings.add("config", problem)
            return None
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer = load_tokenizer(folder)
    except FormatError as error:  # may lack a package, or code that is not run
        findings.note("config", str(error))
        return None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        findings.note("config", f"the tokenizer has tokens up to {highest}, and the embedding {rows} rows")
    return tokenizer


def compare_tokenizers(found: Any, original: Path, findings: Findings, *, is_there: bool) -> None:
    """Compare which tokens have which numbers, and what a text becomes, with the original's tokenizer.

    Parameters
    ----------
    found : PreTrainedTokenizer or None
        What was read; `is_there`, whether there was anything to read.
    original : Path
        Folder of the original.
    findings : Findings
        Takes what differs.
    is_there : bool
        See `found`.
    """
    try:
        theirs = load_tokenizer(original) if has_tokenizer(original) else None
    except FormatError as error:
        findings.note("original", f"tokenizers are not compared: {error}")
        return
    if theirs is not None and found is None:
        if is_there:
            findings.add("original", "tokenizer: it is not read, the original's is")
        else:
            findings.note("original", "the original has a tokenizer, and there is none here to compare")
    if theirs is None or found is None:
        return
    tokens, wanted = _numbers(found), _numbers(theirs)
    taken = set(wanted.values())
    moved = [
        token
        for token, number in tokens.items()
        if number != wanted.get(token, None if number in taken else number)
    ]
    if moved:
        findings.add(
            "original",
            f"tokenizer: {len(moved)} tokens have other numbers than the original's, or numbers of others "
            f"(first: {min(moved)!r:.60})",
        )
    elif _sample(found) != _sample(theirs):
        findings.add("original", "tokenizer: it makes other tokens of a text than the original's")
    alone = (tokens.keys() ^ wanted.keys()) - set(moved)
    if alone:
        findings.note(
            "original",
            f"tokenizer: {len(alone)} tokens are in one of the two alone (first: {min(alone)!r:.60})",
        )


def _numbers(tokenizer: Any) -> dict[str, int]:
    """Tokens and their numbers, without rows that are not used; a space is spelled in two ways."""
    return {
        token.replace("\u2581", " "): number
        for token, number in tokenizer.get_vocab().items()
        if not _UNUSED.fullmatch(token)
    }


def _sample(tokenizer: Any) -> list[int]:
    numbers: list[int] = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    return numbers
