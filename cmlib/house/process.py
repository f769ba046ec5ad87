"""Child processes that do not outlive the command that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class HouseError(Exception):
    """A command cannot go on; the message says why and what mends it."""


def say(text: str) -> None:
    print(f"cmlib: {text}", flush=True)


def _end_with_parent() -> None:
    """Linux ends the child when this process is gone, even where it was killed and could clear nothing up."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


@contextmanager
def running(command: Sequence[str | Path], **env: str) -> Iterator[subprocess.Popen]:
    """A child process in the project's folder that does not outlive the block."""
    tie = _end_with_parent if sys.platform == "linux" else None
    child = subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**os.environ, **env}, preexec_fn=tie)
    try:
        yield child
    except KeyboardInterrupt:  # the terminal interrupted the child as well: let it clear up
        _wait(child, 5)
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            _wait(child, 5)
        if child.poll() is None:
            child.kill()
            child.wait()


def _wait(child: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def run(command: Sequence[str | Path], **env: str) -> int:
    """Run the command to its end and return its exit status."""
    with running(command, **env) as child:
        return child.wait()


def ask(python: str | Path, question: str) -> str:
    """What the interpreter prints for a line of Python; nothing where it is missing or broken."""
    try:
        return subprocess.run([python, "-P", "-c", question], capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
