"""What lies in a folder beside the tensors that are read: recipe, tokenizer, further tensor files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

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

__all__ = ["check_strays", "compare_tokens", "grids_of", "tokens_of"]

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")
# Rows of an embedding without a token, as converters to GGUF name them.
_UNUSED: Final = re.compile(r"\[PAD\d+\]")


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


def tokens_of(folder: Path, rows: int, findings: Findings) -> dict[str, int] | None:
    """Return the tokens of a folder and their numbers; None if there are none, or they are not read here."""
    for name in _TOKENIZER_FILES:
        _, problem = read_json_object(folder / name) if (folder / name).exists() else ({}, None)
        if problem is not None:
            findings.add("config", problem)
            return None
    if not has_tokenizer(folder):
        return None
    try:
        tokens: dict[str, int] = load_tokenizer(folder).get_vocab()
    except FormatError as error:  # may lack a package, or code that is not run
        findings.note("config", str(error))
        return None
    highest = max(tokens.values(), default=-1)
    if highest >= rows:
        findings.note("config", f"the tokenizer has tokens up to {highest}, and the embedding {rows} rows")
    return tokens


def compare_tokens(found: dict[str, int] | None, original: Path, findings: Findings) -> None:
    """Compare which tokens have which numbers with the original's."""
    try:
        wanted: dict[str, int] = load_tokenizer(original).get_vocab() if has_tokenizer(original) else {}
    except FormatError as error:
        findings.note("original", f"tokenizers are not compared: {error}")
        return
    if wanted and found is None:
        findings.note("original", "the original has a tokenizer, which there is none here to compare with")
    if not wanted or found is None:
        return
    taken = set(wanted.values())
    moved = [
        token
        for token, number in found.items()
        if not _UNUSED.fullmatch(token) and number != wanted.get(token, None if number in taken else number)
    ]
    if moved:
        findings.add(
            "original",
            f"tokenizer: {len(moved)} tokens have other numbers than the original's, or numbers of others "
            f"(first: {min(moved)!r:.60})",
        )
    alone = {token for token in found.keys() ^ wanted.keys() if not _UNUSED.fullmatch(token)} - set(moved)
    if alone:
        findings.note(
            "original",
            f"tokenizer: {len(alone)} tokens are in one of the two alone (first: {min(alone)!r:.60})",
        )
