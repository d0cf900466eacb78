"""The rules of the house: imports go one way, an op has one name in four places, files stay small."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "qkern"

# A package imports from itself and from stages above it.
STAGES = (
    ("_version", "errors", "_env", "schemes", "_progress", "_core", "_cuda"),
    ("ops",),
    ("nn",),
    ("quantizers",),
    ("models",),
    ("calibration",),
    ("checkpoints", "gguf"),
    ("evaluation",),
    ("search",),
    ("pipelines",),
    ("plotting",),
    ("integrations", "demo"),
    ("cli",),
)
STAGE = {name: index for index, names in enumerate(STAGES) for name in names}
FOUNDATION = STAGES[0]
# The public names of these are lazy or come last: they may import anything.
ENTRANCES = ("__init__", "__main__")
MAPPED = (
    "csrc/cmake",
    "csrc/core",
    "csrc/include/qkern",
    "python/qkern",
    "python/qkern/ops",
    "bench",
    "tests",
)
FOUR_PLACES = ("csrc/kernels/{op}", "python/qkern/ops/{op}", "tests/ops/test_{op}.py", "bench/bench_{op}.py")


def tracked_files() -> list[Path]:
    # Untracked files count too, so that a file breaks the rule before it is committed.
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "data" not in path.parts)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(path: Path) -> set[str]:
    """First components below ``qkern`` of everything that the file imports, type-only imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.split(".")[1] for name in names if name.startswith("qkern.")}
    # `from qkern import x` of a public name: only packages are known here, a public name is the entrance.
    return {name for name in below if name in STAGE or (PACKAGE / name).exists() or name in ENTRANCES}


def forbidden(package: str, imported: str) -> bool:
    if imported == package:
        return False
    if package in FOUNDATION:
        return imported not in FOUNDATION
    # gguf and checkpoints stand side by side: siblings do not import each other.
    return STAGE[imported] >= STAGE[package]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    package = package_of(path)
    if package in ENTRANCES:
        return
    assert package in STAGE, f"{package} has no place in the import order: add it to STAGES and to the design"
    wrong = {name for name in imported_packages(path) if forbidden(package, name)}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which come after {package}"


def test_rule_sees_a_wrong_import(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("def f():\n    from qkern.nn import QuantLinear\n    return QuantLinear\n")
    assert imported_packages(source) == {"nn"}
    assert forbidden("ops", "nn")
    assert forbidden("schemes", "ops")
    assert not forbidden("nn", "ops")
    assert forbidden("gguf", "checkpoints")


@pytest.mark.parametrize(
    "op", sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").is_file())
)
def test_op_has_its_name_in_four_places(op):
    missing = [place.format(op=op) for place in FOUR_PLACES if not (ROOT / place.format(op=op)).exists()]
    assert not missing


@pytest.mark.parametrize(
    "kernel", sorted(p.name for p in (ROOT / "csrc" / "kernels").iterdir() if p.is_dir())
)
def test_kernel_belongs_to_an_op_and_has_a_readme(kernel):
    assert (PACKAGE / "ops" / kernel / "__init__.py").is_file()
    assert (ROOT / "csrc" / "kernels" / kernel / "README.md").is_file()


def test_no_file_is_over_600_lines():
    sources = [
        p for p in tracked_files() if p.suffix in {".py", ".pyi", ".cpp", ".h", ".cu", ".cmake", ".sh"}
    ]
    assert sources
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_no_utils_module():
    assert not [p for p in tracked_files() if p.stem in {"utils", "util", "helpers", "misc"}]


def test_library_reads_the_environment_in_one_place():
    readers = [p for p in modules() if "os.environ" in p.read_text() and p.name != "_env.py"]
    assert not readers


def test_the_map_names_every_part():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    kernels = {path.name for path in (ROOT / "csrc" / "kernels").iterdir()}
    parts = {
        file.relative_to(ROOT / folder).parts[0]
        for file in tracked_files()
        for folder in MAPPED
        if ROOT / folder in file.parents
    }
    unnamed = {
        part
        for part in parts - kernels - {"conftest.py", "py.typed", "_version.py"}
        if not part.startswith(("__", "test_", "bench_")) and part not in tree
    }
    assert "registry.py" in parts
    assert not unnamed, f"CONTRIBUTING.md's tree does not name {sorted(unnamed)}"
