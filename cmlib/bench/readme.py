"""The README's two made parts: the table of methods, from ``catalog()``, and the bench tables."""

from __future__ import annotations

import re
from pathlib import Path

from ..methods import catalog

README = Path(__file__).resolve().parents[2] / "README.md"


def methods() -> str:
    """The table of methods, in markdown."""
    rows = ["| key | method | kind | knobs of its own | asks for | source |", "|---|---|---|---|---|---|"]
    for m in catalog().values():
        own = ", ".join(f"`{k}`" for k in dict.fromkeys((["keep"] if m.selects else []) + list(m.own_knobs)))
        asks = ", ".join([*(a for a in m.asks if a not in ("w", "training")), *(["acts_in for inputs"] if m.reads_inputs else [])])
        rows.append(f"| `{m.key}` | {m.title} | {m.kind} | {own} | {asks or 'the weight alone'} | {m.paper} |")
    return "\n".join(rows)


def with_part(page: str, name: str, text: str) -> str:
    """The page with ``text`` between its two marks of that name. ValueError where it has no such marks."""
    changed, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"the page has {count} places marked <!-- {name} --> ... <!-- /{name} -->; it needs one")
    return changed


def write(name: str, text: str) -> None:
    """Put ``text`` into the README: written aside, then renamed."""
    aside = README.with_suffix(".md.part")
    aside.write_text(with_part(README.read_text(), name, text))
    aside.replace(README)


if __name__ == "__main__":
    write("methods", methods())
