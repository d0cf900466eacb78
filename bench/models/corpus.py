"""Texts for the test models, from packages that Debian ships; nothing is downloaded.

A corpus is a list of documents (a Bible book, a manual). Held out are whole documents; the
calibration and search texts are chapters taken at a fixed stride from the others, so that all
four texts are disjoint.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Whole books without a parallel account elsewhere (as Kings and Chronicles are to each other).
HELD_OUT_BOOKS = ("Est", "Job", "Eccl", "Dan", "Jonah", "Jas")

SHARE = Path("/usr/share")
MANUALS = {
    "postgresql-doc-15": ("doc/postgresql-doc-15/html", "*.html"),
    "git-doc": ("doc/git/html", "*.html"),
    "debian-policy": ("doc/debian-policy/policy.html", "*.html"),
    "developers-reference": ("developers-reference", "*.html"),
    "python3.11-doc": ("doc/python3.11/html", "*/*.html"),
}
HELD_OUT_MANUALS = ("debian-policy", "developers-reference")

Chapters = list[str]


class MissingSourceError(Exception):
    """A Debian package that a corpus needs is not installed."""

    def __init__(self, *packages: str) -> None:
        super().__init__(f"text source missing; run: apt-get install {' '.join(packages)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Four disjoint texts; `train` is a list of documents, the others are one text each."""

    train: list[str]
    calibration: str
    search: str
    heldout: str


def split(
    documents: dict[str, Chapters],
    held_out: tuple[str, ...],
    calibration_every: int,
    search_every: int,
) -> Corpus:
    """Hold out whole documents and take every n-th chapter of the rest for the other two texts."""
    train: list[str] = []
    calibration: Chapters = []
    search: Chapters = []
    number = 0
    for name, chapters in documents.items():
        if name in held_out:
            continue
        kept = []
        for chapter in chapters:
            number += 1
            if number % search_every == search_every // 2:
                search.append(chapter)
            elif number % calibration_every == calibration_every // 2:
                calibration.append(chapter)
            else:
                kept.append(chapter)
        train.append("\n\n".join(kept))
    heldout = [chapter for name in held_out for chapter in documents[name]]
    texts = ("\n\n".join(part) + "\n" for part in (calibration, search, heldout))
    return Corpus(train=train, **dict(zip(("calibration", "search", "heldout"), texts, strict=True)))


def bible() -> Corpus:
    """Return the King James Version as prose: one paragraph a chapter, without verse numbers."""
    command = shutil.which("bible")
    if command is None or not Path("/usr/lib/bible.data").exists():
        raise MissingSourceError("bible-kjv", "bible-kjv-text")
    verses = subprocess.run(
        [command, "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    books: dict[str, dict[str, list[str]]] = {}
    for line in verses.splitlines():
        reference, verse = line.split(" ", 1)
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+", reference)
        if match is None:
            raise ValueError(f"unexpected line from the bible command: {line!r}")
        books.setdefault(match[1], {}).setdefault(match[2], []).append(verse.strip())
    documents = {
        book: [" ".join(chapter) for chapter in chapters.values()] for book, chapters in books.items()
    }
    return split(documents, HELD_OUT_BOOKS, calibration_every=8, search_every=31)


class _Paragraphs(HTMLParser):
    """Collects the prose of the <p> elements and drops listings, tables and navigation."""

    SKIPPED = frozenset({"pre", "table", "script", "style", "nav", "head"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[str] | None = None
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skipping += 1
        elif tag == "p":
            self._close()
            self._open = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self._skipping = max(0, self._skipping - 1)
        elif tag in ("p", "dd", "li", "div"):
            self._close()

    def handle_data(self, data: str) -> None:
        if self._open is not None and not self._skipping:
            self._open.append(data)

    def _close(self) -> None:
        if self._open is not None:
            text = " ".join("".join(self._open).replace("¶", "").split())
            if len(text.split()) >= 8:
                self.paragraphs.append(text)
        self._open = None


def _pages(folder: Path, pattern: str) -> Iterator[str]:
    """Yield the prose of each HTML page, without paragraphs that an earlier page had."""
    seen: set[str] = set()
    for path in sorted(folder.glob(pattern)):
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        parser.close()
        fresh = [p for p in dict.fromkeys(parser.paragraphs) if p not in seen]
        seen.update(fresh)
        text = "\n".join(fresh)
        if len(text) >= 1000:
            yield text


def technical() -> Corpus:
    """Return prose of manuals that Debian ships; held out are two on a subject of their own."""
    documents = {
        package: list(_pages(SHARE / folder, pattern)) for package, (folder, pattern) in MANUALS.items()
    }
    missing = [package for package, pages in documents.items() if not pages]
    if missing:
        raise MissingSourceError(*missing)
    return split(documents, HELD_OUT_MANUALS, calibration_every=24, search_every=97)


def sample() -> Corpus:
    """Return the search text of the shipped model, cut up again: for tests of the script."""
    path = Path(__file__).parents[2] / "python/qkern/demo/data/bible/search.txt"
    chapters = path.read_text(encoding="utf-8").strip().split("\n\n")
    documents = {"rest": chapters[4:], "first": chapters[:4]}
    return split(documents, ("first",), calibration_every=4, search_every=5)


CORPORA: dict[str, Callable[[], Corpus]] = {
    "bible": bible,
    "technical": technical,
    "sample": sample,
}
