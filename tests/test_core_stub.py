"""_core.pyi says what the native module has: every function, every argument name, every type.

``python tests/test_core_stub.py`` prints the stub that the built module calls for; ruff formats it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from qkern import _core

STUB = Path(_core.__file__).parent / "_core.pyi"
HEAD = '''"""Types of the native module; raw pointers are integers. A test compares both."""

from collections.abc import Sequence
from typing import Any

__version__: str
'''


def python_type(text: str) -> str:
    """What the stub writes for a type that pybind11 prints."""
    text = re.sub(r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int", text)
    text = re.sub(r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float", text)
    text = re.sub(r"\b(qkern\._core|collections\.abc)\.", "", text)
    return "dict[str, Any]" if text == "dict" else text.replace("object", "Any")


def stub_line(name: str, doc: str, *, method: bool = False) -> str:
    """Turn the first line of a pybind11 docstring into a stub's def."""
    match = re.match(rf"{name}\((.*)\) -> (.*)", doc.splitlines()[0])
    assert match is not None, f"{name} has no signature in its docstring: {doc!r}"
    arguments = []
    for argument in filter(None, re.split(r", (?=\w+: )", match[1])):
        key, _, kind = argument.partition(": ")
        arguments.append(key if method and key == "self" else f"{key}: {python_type(kind)}")
    return f"def {name}({', '.join(arguments)}) -> {python_type(match[2])}: ..."


def expected_stub() -> str:
    """Stub of the module that is loaded, in alphabetical order."""
    lines = [HEAD.rstrip("\n")]
    for name in sorted(name for name in vars(_core) if not name.startswith("_")):
        value = getattr(_core, name)
        if isinstance(value, type):
            lines.append(f"class {name}:")
            for member, part in sorted(vars(value).items()):
                doc = getattr(part, "__doc__", None)
                if member not in ("__init__", "__call__") and member.startswith("_"):
                    continue
                if isinstance(part, property):
                    kind = python_type((part.fget.__doc__ or "").partition("-> ")[2].strip() or "Any")
                    lines.append(f"    @property\n    def {member}(self) -> {kind}: ...")
                elif doc is not None:
                    lines.append("    " + stub_line(member, doc, method=True))
            if "__init__" not in vars(value):
                lines.append("    ...")
        elif callable(value):
            lines.append(stub_line(name, value.__doc__))
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def test_core_stub_matches_the_module() -> None:
    declared = ast.unparse(ast.parse(STUB.read_text(encoding="utf-8")))
    assert declared == ast.unparse(ast.parse(expected_stub())), (
        "the stub is out of date: python tests/test_core_stub.py"
    )


if __name__ == "__main__":
    print(expected_stub(), end="")
