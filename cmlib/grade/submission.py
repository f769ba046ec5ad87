"""Submissions, found and read with suspicion: every byte may be hostile, and nothing here runs or imports any of it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 1 << 20
LARGEST, CELLS = 16 * MB, 5000  # of a notebook with its outputs


@dataclass(frozen=True)
class Submission:
    """What one student handed in. ``path`` is None where there is no notebook; ``student`` is the folder's or flat file's name: trusted."""

    student: str
    exercise: str
    path: Path | None
    timestamp: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notebook:
    """A notebook as read: ``content`` as nbformat has it (plain dicts), None where the file cannot be read as one, and then a note says why."""

    content: dict[str, Any] | None
    notes: tuple[str, ...]
    cells: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)  # kind, nbgrader's id, text

    @property
    def code(self) -> tuple[str, ...]:
        """The texts of the code cells, in order."""
        return tuple(text for kind, _, text in self.cells if kind == "code")

    def texts(self, cell: str) -> list[str]:
        """The texts of the cells with this nbgrader id: none where it was deleted, several where it was copied."""
        return [text for _, name, text in self.cells if name == cell]


class Unreadable(Exception):
    """The file is no notebook that can be judged; the message is a line of the report."""


def find(folder: Path, exercise: str) -> list[Submission]:
    """One submission a student, sorted by student.

    Layouts: nbgrader's ``<student>/<exercise>/<notebook>.ipynb``, ``<student>/<notebook>.ipynb``, flat ``<student>.ipynb``. Links are not followed.
    """
    found = [s for entry in _entries(folder) if (s := _submission(entry, exercise))]
    found.sort(key=lambda s: (s.student, s.path is None, s.path is not None and s.path.parent == folder))
    first: dict[str, Submission] = {}
    for s in found:
        kept = first.setdefault(s.student, s)
        if kept is not s and s.path:
            note = f"handed in twice: {str(s.path.relative_to(folder))!r} was not read"
            first[s.student] = Submission(kept.student, exercise, kept.path, kept.timestamp, (*kept.notes, note))
    return list(first.values())


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in the folder, hidden files aside, in the order of names."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _submission(entry: os.DirEntry, exercise: str) -> Submission | None:
    student = entry.name if entry.name.isprintable() else ascii(entry.name)[1:-1]
    if entry.name.endswith(".ipynb"):
        return Submission(student.removesuffix(".ipynb"), exercise, Path(entry.path))
    if entry.is_symlink():
        return Submission(student, exercise, None, None, ("the student's folder is a link, which is not followed",))
    if not entry.is_dir():
        return None
    inner = Path(entry.path, exercise)
    folder = inner if inner.is_dir() and not inner.is_symlink() else Path(entry.path)
    try:
        paths = [Path(e.path) for e in _entries(folder) if e.name.endswith(".ipynb")]
    except OSError as error:
        return Submission(student, exercise, None, None, (f"the student's folder cannot be read: {error.strerror}",))
    paths.sort(key=lambda p: (p.stem != exercise, p.name))
    notes = [f"{len(paths)} notebooks: {paths[0].name!r} was read"] if len(paths) > 1 else [] if paths else ["no notebook was handed in"]
    return Submission(student, exercise, paths[0] if paths else None, _timestamp(folder), tuple(notes))


def _timestamp(folder: Path) -> str | None:
    return _line(folder / "timestamp.txt") or None


def secret(submission: Submission) -> str:
    """What nbgrader's exchange names this submission's feedback by; empty where it did not come from there."""
    return _line(submission.path.with_name("submission_secret.txt")) if submission.path else ""


def _line(path: Path) -> str:
    try:
        return _bytes(path, 200).decode().strip()
    except (Unreadable, UnicodeDecodeError):
        return ""


def read(submission: Submission) -> Notebook:
    """The notebook of a submission. It never raises for what the file holds."""
    if submission.path is None:
        return Notebook(None, ())
    try:
        content = _content(_bytes(submission.path, LARGEST))
        return Notebook(content, tuple(_remarks(content)), tuple(_cells(content)))
    except Unreadable as error:
        return Notebook(None, (str(error),))


def digest(submission: Submission) -> str:
    """Of the student's name and the file's bytes, or of what is in their place."""
    try:
        data = _bytes(submission.path, LARGEST) if submission.path else b""
    except Unreadable as error:
        data = str(error).encode()
    return hashlib.sha256("\n".join((submission.student, *submission.notes, "")).encode() + data).hexdigest()


def _bytes(path: Path, most: int) -> bytes:
    """A plain file's bytes: no link, no pipe or device that would never end, nothing larger than ``most``."""
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"{path.name!r} is no file")
            if status.st_size > most:
                raise Unreadable(
                    f"{path.name!r} has {status.st_size / MB:,.0f} MB, more than the {most / MB:,.0f} MB that are read: clear its outputs"
                )
            return file.read(most)
    except OSError as error:
        raise Unreadable(f"{path.name!r} is a link, which is not followed" if path.is_symlink() else f"{path.name!r}: {error.strerror}") from error


def _content(data: bytes) -> dict[str, Any]:
    if not data.strip():
        raise Unreadable("the file is empty")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no notebook: the file is not JSON ({type(error).__name__})") from error
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise Unreadable("no notebook: JSON without cells")
    if len(content["cells"]) > CELLS:
        raise Unreadable(f"no notebook: {len(content['cells']):,} cells")
    return content


def _cells(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for cell in content["cells"]:
        text = _get(cell, "source")
        if isinstance(text, list):
            text = "".join(line for line in text if isinstance(line, str))
        if isinstance(text, str):
            # half a surrogate pair can be read but never written again
            yield str(_get(cell, "cell_type")), str(_get(cell, "metadata", "nbgrader", "grade_id")), text.encode("utf-8", "replace").decode()


def _remarks(content: dict[str, Any]) -> Iterator[str]:
    language = _get(content, "metadata", "kernelspec", "language") or _get(content, "metadata", "language_info", "name") or "python"
    if str(language).lower() != "python":
        yield f"the notebook's language is {str(language)[:40]!r}: its cells are run as Python all the same"
    if not any(kind == "code" and text.strip() for kind, _, text in _cells(content)):
        yield "the notebook has no code"


def _get(value: Any, *keys: str) -> Any:
    """``value[key][key]...``, None where anything on the way is no dict."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
