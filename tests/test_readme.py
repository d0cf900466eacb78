"""The README's Python blocks run, in order, in one namespace, as a reader would paste them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import qkern

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
)


def test_readme_has_python_blocks() -> None:
    assert BLOCKS


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A reader imports it for the first time, which is what enables it.
    monkeypatch.delitem(sys.modules, "qkern.integrations.transformers", raising=False)
    namespace: dict[str, object] = {}
    try:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"README.md block {number}", "exec"), namespace)
    finally:
        qkern.disable()  # a block lets transformers use qkern, which other tests do not expect
