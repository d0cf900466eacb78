"""What lies in a folder beside the tensors that are read: recipe, tokenizer, further tensor files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.calibration import has_tokenizer, load_tokenizer
from qkern.checkpoints import RECIPE_NAME
from qkern.errors import FormatError, InputError, reason_of
from qkern.pipelines.verification.safetensors_files import read_json_object
from qkern.search import parse_choice

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qkern.ops.gguf_types import GGUFType
    from qkern.pipelines.verification.report import Findings
    from qkern.schemes import Scheme

__all__ = ["check_strays", "check_tokenizer", "compare_tokenizers", "grids_before"]


def grids_before(folder: Path, findings: Findings) -> dict[str, Scheme | GGUFType | None]:
    """Grids on which the tensors of a converted folder were before, by their names in the files."""
    file = folder / RECIPE_NAME
    if not file.exists():
        return {}  # a recipe need not be there
    recipe, problem = read_json_object(file)
    if problem is not None:
        findings.add("config", problem)
    if "converted_from" not in recipe:
        return {}
    try:
        said = {name: layer["before"] for name, layer in recipe["layers"].items()} | recipe["decoded"]
        return {name: parse_choice(before) for name, before in said.items()}
    except (InputError, AttributeError, KeyError, TypeError) as error:
        findings.add("config", f"layers of {RECIPE_NAME} are damaged: {reason_of(error)}")
        return {}


def check_strays(folder: Path, read: Iterable[Path], findings: Findings) -> None:
    """Note tensor files that are not read, of which some readers take another than the index says."""
    strays = sorted({file.name for file in folder.glob("*.safetensors")} - {file.name for file in read})
    if strays:
        findings.note(
            "files",
            f"{', '.join(strays)} beside the files of the model: qkern does not read what the index does not "
            "name, other readers may",
        )


def check_tokenizer(folder: Path, rows: int, findings: Findings) -> None:
    """Look whether the tokenizer is read, and whether the embedding has a row for each of its tokens."""
    try:
        highest = max(_numbers(folder).values(), default=-1)
    except FormatError as error:
        findings.add("files", str(error))
        return
    if highest >= rows:
        findings.note("files", f"the tokenizer has tokens up to {highest}, and the embedding {rows} rows")


def compare_tokenizers(folder: Path, original: Path, findings: Findings) -> None:
    """Compare which tokens have which numbers."""
    try:
        found, wanted = _numbers(folder), _numbers(original)
    except FormatError:
        return  # said above, or not of what is verified
    if not found and wanted:
        findings.note("original", "the original has a tokenizer, the folder has none")
        return
    differing = [token for token in wanted.keys() | found.keys() if found.get(token) != wanted.get(token)]
    if wanted and differing:
        findings.add(
            "original",
            f"tokenizer: {len(differing)} tokens have other numbers than the original's (first: "
            f"{min(differing)!r:.60})",
        )


def _numbers(folder: Path) -> dict[str, int]:
    """Tokens and their numbers; none if there is no tokenizer.

    Raises
    ------
    FormatError
        If it is not read.
    """
    found: dict[str, int] = load_tokenizer(folder).get_vocab() if has_tokenizer(folder) else {}
    return found
