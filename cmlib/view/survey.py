"""Where the surveys have a method: the place that its docstring names, and the group of methods that it stands in there."""

from __future__ import annotations

import re

from ..core.method import Method

SURVEY = {  # the survey's groups (Gao et al. 2021, 001), and the references that it names in each
    "2.1.1 Weights: by second derivatives": range(19, 23),
    "2.1.1 Weights: by connection": range(23, 27),
    "2.1.1 Weights: by neuron, noise or penalty": range(27, 35),
    "2.1.1 Weights: to a budget": (13, 14),
    "2.1.2 (1) Groups: one pattern for all filters": range(35, 40),
    "2.1.2 (2) Filters: by their norm": (15, *range(40, 44)),
    "2.1.2 (2) Filters: by a score of their own": (17, *range(44, 49)),
    "2.1.2 (2) Filters: by the error of what is rebuilt": range(49, 53),
    "2.1.2 (2) Filters: other ways": (16, *range(53, 56)),
    "2.2.1 (1) One bit: weights": range(56, 62),
    "2.2.1 (2) One bit: weights and inputs": range(62, 67),
    "2.2.2 Three levels": range(67, 70),
    "2.2.3 Clusters": range(70, 74),
    "2.2.4 (1) Mixed bits: fixed by hand": range(74, 84),
    "2.2.4 (2) Mixed bits: found": (18, *range(84, 87)),
    "2.2.5 Ways of training": range(87, 96),
}
ELSEWHERE = "Not among that survey's references"


def section(method: Method) -> str:
    """Where the survey has it, "001, 2.1.2 [38]", as the docstring says; empty where it has not."""
    found = re.search(r"[Ss]urvey (\d{3}(?:, \d[\d.]*\d(?: \(\d\))?(?: Table \d)?(?: \[\d+\])?)?)", " ".join(method.__doc__.split()))
    return found[1] if found else ""


def group(method: Method) -> str:
    """The survey's group of a method, by the reference that its docstring names; the bare section of what stands in no group above."""
    found = re.match(r"001, ([\d.]+).*\[(\d+)\]", section(method))
    return next((name for name, references in SURVEY.items() if int(found[2]) in references), found[1]) if found else ELSEWHERE


def place(name: str) -> tuple[int, str]:
    """What sorts groups as the survey does; what it has not comes last."""
    return (list(SURVEY).index(name) if name in SURVEY else len(SURVEY), name)
