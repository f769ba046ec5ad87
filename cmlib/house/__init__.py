"""The commands behind ``python -m cmlib``: install, open the notebooks, test, measure.

Only the standard library is imported here, and nothing else of cmlib: the commands work on a bare Python 3.11 and run
everything else with the interpreter of ``.venv``, or with the one that the environment variable CMLIB_PYTHON names.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .install import chromium, environment
from .process import ROOT, HouseError, run, say
from .server import LOOPBACK, choose_port, has_screen, serve, server_options
from .tally import Tally

START = "notebooks/00_start_here.ipynb"

# Each command takes the arguments that follow its name and returns an exit status.


def setup(args: list[str]) -> int:
    """Install everything into .venv (again only where something has changed)."""
    say(f"ready: {environment()}")
    return 0


def lab(args: list[str]) -> int:
    """Open the notebooks in JupyterLab: [--port N] [--no-browser]."""
    options = server_options(lab, args)
    python, port = environment(), choose_port(options.port, 8888)
    command = [
        python, "-m", "jupyterlab", "--log-level=WARN", "--LabApp.log_level=WARN",
        f"--ip={LOOPBACK}", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={ROOT}",
        "--ServerApp.answer_yes=True", f"--LabApp.default_url=/lab/tree/{START}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return serve("JupyterLab", command, port, f"/lab/tree/{START}", has_screen() and not options.no_browser)


def voila(args: list[str]) -> int:
    """Show one notebook as a page of its own, without code: NOTEBOOK [--port N] [--no-browser]."""
    options = server_options(voila, args, "notebook")
    notebook = Path(options.notebook).resolve()
    if not notebook.is_file():
        raise HouseError(f"no notebook {options.notebook}")
    python, port = environment(), choose_port(options.port, 8866)
    command = [
        python, "-m", "voila", notebook, "--Voila.log_level=WARN", f"--Voila.ip={LOOPBACK}", f"--port={port}",
        "--Voila.port_retries=0", "--Voila.auto_token=True",
    ]  # fmt: skip
    return serve("Voila", command, port, "/", has_screen() and not options.no_browser)


def test(args: list[str]) -> int:
    """Run all tests: Python's, the notebooks', the browser's. With pytest arguments: pytest with these, and no more."""
    started, python, tally = time.monotonic(), environment(), Tally()
    workers = ["-n", "2", "--dist", "loadfile"]
    if args:
        tally.pytest(python, "tests", *workers, *args)
    else:
        tally.pytest(python, "tests", "-p", "no:nbval", "--ignore=tests/browser", *workers)  # the plugin takes seconds to import
        if any((ROOT / "notebooks").glob("*.ipynb")):
            tally.pytest(python, "notebooks", "--nbval-lax", "--nbval-cell-timeout=120", *workers, "notebooks")
        if any((ROOT / "tests/browser").glob("test_*.py")):
            if browser := chromium(python):
                tally.pytest(python, "browser", *workers, "tests/browser", CMLIB_CHROMIUM=browser)
            else:
                say("left out: tests/browser, for want of Chromium (apt install chromium, or name one in CMLIB_CHROMIUM)")
    print(tally.summary(time.monotonic() - started), flush=True)
    return tally.status


def bench(args: list[str]) -> int:
    """Measure speed and size; the arguments go to cmlib.bench."""
    return run([environment(), "-m", "cmlib.bench", *args])


def fuzz(args: list[str]) -> int:
    """Load altered files, of which none may pass for whole: [--files 100000] [--seed S]."""
    return run([environment(), "-m", "cmlib.lab.fuzz", *args])


def train(args: list[str]) -> int:
    """Train the checkpoints that are missing: [--net NET] [--data DATA] [--seed SEED]."""
    return run([environment(), "-m", "cmlib.lab.zoo", *args])


def mutants(args: list[str]) -> int:
    """Plant a fault in every method, one at a time, and print the test that notices it: [KEY ...] [--jobs 2]."""
    return run([environment(), ROOT / "tests" / "mutants.py", *args])


def notebooks(args: list[str]) -> int:
    """Run every notebook afresh and store what it shows, or those given: [NOTEBOOK ...]."""
    python = environment()
    for path in [Path(a).resolve() for a in args] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = os.path.relpath(path, ROOT)
        say(f"running {name}")
        if status := run([python, "-m", "cmlib.house.execute", name]):
            return status
    return 0


def exercises(args: list[str]) -> int:
    """Build the exercises' student notebooks in exercises/release, or those named: [chapter01 ...]."""
    return run([environment(), "-m", "cmlib.grade.release", *args])


def grade(args: list[str]) -> int:
    """Grade submissions, each in a box of its own: SUBMISSIONS --out GRADES [...]; --help lists the rest."""
    return run([environment(), "-m", "cmlib.grade", *args])


def lint(args: list[str]) -> int:
    """Check the code, or the paths given, with ruff."""
    ruff, paths = [environment(), "-m", "ruff"], args or ["."]
    return run([*ruff, "check", *paths]) or run([*ruff, "format", "--check", *paths])


def clean(args: list[str]) -> int:
    """Remove caches and what building leaves; .venv, data and checkpoints stay."""
    litter = {"__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "cmlib.egg-info"}
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    for folder, inner, _ in os.walk(ROOT):
        for name in litter.intersection(inner):
            shutil.rmtree(Path(folder) / name)
        inner[:] = [name for name in inner if name not in {".venv", ".git", *litter}]
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    f.__name__: f for f in (setup, lab, voila, test, bench, fuzz, mutants, notebooks, exercises, grade, lint, train, clean)
}
PLAIN = (setup, clean)  # these take no arguments


def usage() -> str:
    lines = "\n".join(f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items())
    return f"""python -m cmlib COMMAND

{lines}

Whatever a command needs is installed into .venv first. Environment variables: CMLIB_PYTHON names an interpreter to use
instead (you keep its packages yourself), CMLIB_CHROMIUM a browser for the browser tests, CMLIB_CIFAR10 the CIFAR-10 data
(datasets/README.md)."""


def main(args: list[str]) -> int:
    name, *rest = args or ["help"]
    if name in ("help", "-h", "--help"):
        print(usage())
        return 0
    try:
        command = COMMANDS.get(name)
        if command is None:
            raise HouseError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
        if rest and command in PLAIN:
            raise HouseError(f"{name} takes no arguments, and got {' '.join(rest)}")
        for end in ("SIGTERM", "SIGHUP"):  # asked to end: unwind, so that no child stays behind
            if hasattr(signal, end):
                signal.signal(getattr(signal, end), lambda number, _: sys.exit(128 + number))
        return command(rest)
    except HouseError as error:
        print(f"cmlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
