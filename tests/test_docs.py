"""The pages under docs/: their Python and their commands run, in order, as a reader would paste them."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import yaml

import qkern
import qkern.evaluation
import qkern.ops
from qkern.cli import COMMANDS, main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
START = DOCS / "quickstart.md"
MODEL = "model-w4g128"  # what the quickstart writes and the other pages read

# `<!-- needs X -->` before a block: it runs where there is X.
NEEDS = {
    "a GPU": torch.cuda.is_available(),
    "the lm-eval package": find_spec("lm_eval") is not None,
    "the network": False,
    "minutes": False,
}
_BLOCK = re.compile(
    r"(?:^<!-- needs (?P<need>[^\n]*?) -->\n\n?)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
# Rows of the README and of pages that another of them has, so that a figure is changed in one place.
_COPIED = re.compile(r"^<!-- from (\S+) -->\n\n((?:\|[^\n]*\n)+)", re.M)


class Block(NamedTuple):
    """A fenced block of a page, and what it needs to run."""

    need: str | None
    language: str
    code: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[Block]:
    return [Block(*found.group("need", "language", "code")) for found in _BLOCK.finditer(text_of(page))]


def run_line(line: str) -> None:
    """Run a line of a shell block: a command of qkern's, in this process, or an assignment."""
    if line.startswith("qkern "):
        with pytest.raises(SystemExit) as end:
            main(shlex.split(os.path.expandvars(line), comments=True)[1:])
        assert not end.value.code, line
        return
    name = re.match(r"(\w+)=", line)
    assert name is not None, f"neither a qkern command nor an assignment: {line}"
    os.environ[name[1]] = subprocess.check_output(["bash", "-ec", f"{line}\nprintf %s ${name[1]}"], text=True)


def run_page(page: Path, folder: Path) -> None:
    """Run what the machine can of a page, in a folder: Python in one namespace, shell blocks by lines."""
    namespace: dict[str, object] = {}
    # A reader imports it for the first time, which is what enables it.
    sys.modules.pop("qkern.integrations.transformers", None)
    try:
        with contextlib.chdir(folder):
            for number, block in enumerate(blocks_of(page)):
                if block.need is not None and not NEEDS[block.need]:
                    continue
                if block.language == "python":
                    exec(compile(block.code, f"{page.name} block {number}", "exec"), namespace)
                elif block.language == "sh":
                    for line in filter(None, re.sub(r"\\\n\s*", "", block.code).splitlines()):
                        run_line(line)
    finally:
        qkern.disable()  # a block lets transformers use qkern, which other tests do not expect


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder in which the quickstart ran; the variables of its shell stay set for the other pages."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MODEL", "CALIBRATION", "HELDOUT"):
            patch.setenv(name, "")  # restored at the end, whatever the page sets
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        run_page(START, folder)
        yield folder


def test_quickstart_runs(start: Path) -> None:
    assert (start / MODEL / "qkern.json").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page != START], ids=lambda page: page.stem)
def test_page_runs(page: Path, start: Path, tmp_path: Path) -> None:
    shutil.copytree(start / MODEL, tmp_path / MODEL)
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_say_what_they_need(page: Path) -> None:
    text, blocks = text_of(page), blocks_of(page)
    assert len(blocks) * 2 == len(re.findall("^```", text, re.M))
    needs = [block.need for block in blocks if block.need is not None]
    assert set(needs) <= NEEDS.keys()
    assert len(needs) == text.count("<!-- needs")  # none is astray
    assert {block.language for block in blocks} <= {"python", "sh", "text"}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page))
    assert [link for link in links if "://" not in link and not (page.parent / link).is_file()] == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_copied_tables_are_those_of_their_page(page: Path) -> None:
    text = text_of(page)
    copies = _COPIED.findall(text)
    assert len(copies) == text.count("<!-- from")
    for source, table in copies:
        known = text_of(ROOT / source).splitlines()
        assert [row for row in table.splitlines() if row not in known] == []


def test_site_builds(tmp_path: Path) -> None:
    """Strictly: a link, an anchor or a public name that is not there fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for page in PAGES:
        folder = tmp_path if page.stem == "index" else tmp_path / page.stem
        assert (folder / "index.html").is_file()


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [name for entry in config["nav"] for name in entry.values()]
    assert sorted(named) == [page.name for page in PAGES]


def test_every_command_has_a_section() -> None:
    assert re.findall(r"^## `qkern ([\w-]+)`$", text_of(DOCS / "commands.md"), re.M) == list(COMMANDS)


def test_api_names_what_is_public() -> None:
    directives = re.findall(r"^::: (\S+)$", text_of(DOCS / "api.md"), re.M)
    for name in directives:
        package, _, leaf = name.rpartition(".")
        assert callable(getattr(importlib.import_module(package), leaf)), name
        assert name not in sys.modules, f"{name} is a module, all of which would be rendered"
    leaves = {name.rpartition(".")[2] for name in directives if name.startswith("qkern.ops.")}
    assert leaves == set(qkern.ops.__all__)
    assert {name.removeprefix("qkern.") for name in directives if name.count(".") == 1} == (
        set(qkern.__all__) - {"__version__"}
    )
