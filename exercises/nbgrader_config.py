"""nbgrader's settings for this course; its commands run in this folder: ``cd exercises && nbgrader formgrader``."""

from pathlib import Path

c = get_config()  # noqa: F821  (nbgrader gives it)

c.CourseDirectory.course_id = "cmlib"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.Exchange.path_includes_course = True
# ClearSolutions' stubs stay nbgrader's own: by "YOUR ANSWER HERE" the grader knows a text that nobody has written.
c.ExecutePreprocessor.timeout = 60  # seconds a cell, where nbgrader itself runs a notebook (validate)
