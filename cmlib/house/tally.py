"""Several runs of pytest, counted together."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from .process import run


@dataclass
class Tally:
    """What several runs of pytest counted, read from the reports that they wrote."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tests", "failures", "errors", "skipped"), 0))
    broken: list[str] = field(default_factory=list)
    status: int = 0

    def pytest(self, python: Path, name: str, *args: str, **env: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # two workers share the cores
            status = run([python, "-m", "pytest", *args, f"--junitxml={report}"], **one_thread, **env)
            self.add(name, status, report)

    def add(self, name: str, status: int, report: Path) -> None:
        """Count a run. Status 1 says no more than the counts do; any other that is not 0 is a run that broke off."""
        self.status = self.status or status
        if status not in (0, 1):
            self.broken.append(f"{name} (exit status {status})")
        if report.is_file():
            for suite in ET.parse(report).getroot().iter("testsuite"):
                for key in self.counts:
                    self.counts[key] += int(suite.get(key, 0))

    def summary(self, seconds: float) -> str:
        bad = self.counts["failures"] + self.counts["errors"]
        passed = self.counts["tests"] - bad - self.counts["skipped"]
        broken = f", broken off: {', '.join(self.broken)}" if self.broken else ""
        return f"cmlib test: {passed} passed, {self.counts['skipped']} skipped, {bad} failed{broken} in {duration(seconds)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
