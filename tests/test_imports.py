"""Imports run downward only: core <- methods, lab <- view, grade; grade knows from house, which stands by itself, where the project lies."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cmlib"
OWN = {"core", "methods", "lab", "view", "grade"}
BELOW = {
    "core": {"core"},
    "methods": {"core", "methods"},
    "lab": {"core", "methods", "lab"},
    "view": {"core", "methods", "lab", "view"},
    "grade": {"core", "methods", "lab", "view", "grade", "house"},
    "house": {"house"},
}
OUTSIDE = {
    "core": {"constriction", "numpy", "torch", "torch_pruning"},
    "methods": {"torch"},
}  # beside the standard library; others may import anything
FILES = sorted(p for p in PACKAGE.rglob("*.py") if len(p.relative_to(PACKAGE).parts) > 1)


def imported(path, text):
    """(part of cmlib or None, top-level name) of every import in a file's text, wherever it stands."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, a.name] for a in node.names]
        else:
            continue
        for name in names:
            yield (name[1] if len(name) > 1 else "") if name[0] == "cmlib" else None, name[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    layer = path.relative_to(PACKAGE).parts[0]
    for part, top in imported(path, path.read_text()):
        if part is not None and layer in BELOW:
            assert part in BELOW[layer], f"{path.name} of {layer} imports {part or 'the package itself'}"
        elif part is None and layer in OUTSIDE:
            assert top in OUTSIDE[layer] | sys.stdlib_module_names, f"{path.name} of {layer} imports {top}"


def test_every_part_is_known():
    assert {p.relative_to(PACKAGE).parts[0] for p in FILES} <= {*BELOW, "bench"}


@pytest.mark.parametrize(
    "line",
    ["from ..lab import zoo", "from cmlib.lab.zoo import build", "import cmlib.lab.zoo", "def f():\n    from ..lab.zoo import build"],
)
def test_the_walk_sees_an_import_upward_however_it_is_written(line):
    assert ("lab", "cmlib") in list(imported(PACKAGE / "core" / "example.py", line))
