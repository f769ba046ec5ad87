"""``make exercises``: student notebooks by nbgrader's own ``generate_assignment``, from ``exercises/source/`` into ``exercises/release/``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbgrader import utils
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from ..house.process import ROOT
from .gradebook import opened

COURSE = ROOT / "exercises"


def settings(course: Path) -> Config:
    """The course's ``nbgrader_config.py``."""
    return PyFileConfigLoader("nbgrader_config.py", str(course)).load_config()


def release(exercise: str, course: Path = COURSE) -> Path:
    """Make one student notebook anew; returns its path. ValueError where somebody has worked in the old one, or nbgrader refuses the source."""
    made = course / "release" / exercise / f"{exercise}.ipynb"
    if not (course / "source" / exercise).is_dir():
        raise ValueError(f"no exercise {exercise!r}; there are {', '.join(exercises(course))}")
    if made.is_file() and worked_in(made):
        raise ValueError(f"{made.parent} has been worked in, and would be overwritten: move it away first")
    nbgrader = NbGraderAPI(config=settings(course))
    with opened(nbgrader.coursedir.db_url):
        answer = nbgrader.generate_assignment(exercise, force=True)
    if not answer["success"]:
        raise ValueError(f"nbgrader refuses {exercise}:\n{answer.get('error') or answer.get('log')}")
    return made


def exercises(course: Path = COURSE) -> list[str]:
    return sorted(p.name for p in (course / "source").iterdir() if p.is_dir())


def worked_in(notebook: Path) -> bool:
    """Whether an answer differs from what was released, by the checksums that nbgrader left in the cells."""
    answers = [c for c in nbformat.read(notebook, as_version=4).cells if utils.is_solution(c)]
    return any(c.metadata.nbgrader.get("checksum") != utils.compute_checksum(c) for c in answers)


def main(names: list[str]) -> int:
    try:
        for name in names or exercises():
            print(f"cmlib: {release(name)}", flush=True)
    except ValueError as error:
        print(f"cmlib: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
