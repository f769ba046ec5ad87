"""What the README says is true: its method in ten lines runs, its table is the catalogue's, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from cmlib.bench import readme
from cmlib.bench.__main__ import SECTIONS
from cmlib.core.apply import plan_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def test_the_method_in_ten_lines_runs_and_acts(tmp_path):
    code = next(b for b in blocks() if "@score" in b)
    assert len([line for line in code.split("\n") if line.strip()]) <= 10
    path = tmp_path / "method.py"
    path.write_text(code)
    names: dict = {}
    exec(compile(code, str(path), "exec"), names)
    plan = plan_of(names["small"])
    assert sum(p.kept for p in plan.values()) == sum(p.mask.numel() - round(0.8 * p.mask.numel()) for p in plan.values())
    assert next(iter(names["damped_gradient"].knobs)) == "keep" and "power" in names["damped_gradient"].knobs


def test_the_five_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(next(b for b in blocks() if "measure(" in b), {})
    assert (tmp_path / "small.safetensors").stat().st_size < 400_000


def test_what_is_baked_is_really_smaller():
    names: dict = {}
    exec(next(b for b in blocks() if "bake(" in b), names)
    small, dense = (sum(p.numel() for p in m.parameters()) for m in (names["bake"](names["masked"]), names["dense"]))
    assert small < 0.7 * dense


def test_the_table_of_methods_is_the_catalogue():
    assert readme.with_part(PAGE, "methods", readme.methods()) == PAGE, "run: python -m cmlib.bench.readme"


def test_every_table_of_the_bench_has_its_place():
    for name in SECTIONS:
        assert readme.with_part(PAGE, f"bench {name}", "new").count("new") > PAGE.count("new")
    with pytest.raises(ValueError, match=r"0 places marked <!-- bench none -->"):
        readme.with_part(PAGE, "bench none", "new")


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_sections_of_a_notebook_are_numbered_without_a_gap(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    numbers = [int(n) for n in re.findall(r"^## (\d+) ·", text, flags=re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
