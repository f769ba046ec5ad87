"""The graded exercises: checks for the learner, points for the lecturer. Nothing here imports torch before a question needs it."""

from .checks import check, hint
from .trial import trial
from .variants import variant

__all__ = ["check", "hint", "trial", "variant"]
