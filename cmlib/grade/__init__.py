"""The graded exercises: checks for the learner, points for the lecturer. Nothing here imports torch before a question needs it."""

from .trial import trial

__all__ = ["trial"]
