"""Chapter 01's graders, tried with solutions right and wrong."""

from solutions_chapter01 import solutions
from tried import Graders


class TestChapter01(Graders):
    solutions = solutions
