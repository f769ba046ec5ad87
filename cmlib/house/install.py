"""The interpreter that runs everything: the one of ``.venv``, complete, or the user's own."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .process import ROOT, HouseError, ask, run, say

REQUIRED = ("requirements.txt", "constraints.txt", "pyproject.toml")
IMPORTS = ("torch", "torchvision", "jupyterlab", "ipywidgets", "anywidget", "nbval", "xdist", "cmlib")
NEWS = "@jupyterlab/apputils-extension:announcements"  # asks on JupyterLab's first start whether it may fetch news


def interpreter(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def probe(python: Path) -> str:
    """The version of a sound interpreter, one that starts, is new enough and has pip; "" of any other."""
    question = "import sys, importlib.util as u; print(u.find_spec('pip') and sys.version_info >= (3, 11) and sys.version.split()[0] or '')"
    return ask(python, question)


def digest(root: Path, version: str) -> str:
    """What an installation depends on, as one hash: the stamp in .venv holds it. A moved folder breaks an editable install."""
    found = hashlib.sha256(f"{version} {root}".encode())
    for name in REQUIRED:
        found.update((root / name).read_bytes())
    return found.hexdigest()


def environment(root: Path = ROOT, call: Callable[..., int] = run, probe: Callable[[Path], str] = probe) -> Path:
    """The interpreter with all requirements installed; instant where nothing has changed since the last time."""
    if own := os.environ.get("CMLIB_PYTHON"):
        return users_own(own)
    venv = root / ".venv"
    python, stamp = interpreter(venv), venv / "cmlib.stamp"
    version = probe(python)
    if version and stamp.is_file() and stamp.read_text() == digest(root, version):
        return python
    stamp.unlink(missing_ok=True)
    if not version:
        create(venv, call)
        version = probe(python)
    install(root, python, call)
    stamp.write_text(digest(root, version))
    return python


def users_own(python: str) -> Path:
    """CMLIB_PYTHON's interpreter, which its owner keeps: it is looked at, and nothing is installed there."""
    found = shutil.which(python)
    if not found or not ask(found, "print(1)"):
        raise HouseError(f"CMLIB_PYTHON={python}: no such Python, or older than 3.11")
    lacking = ask(found, f"import importlib.util as u; print(*(m for m in {IMPORTS} if not u.find_spec(m)))")
    if lacking:
        raise HouseError(
            f"CMLIB_PYTHON={python} lacks {lacking}; install there, in {ROOT}: '{found} -m pip install -r requirements.txt -c constraints.txt -e .'"
        )
    return Path(found)


def create(venv: Path, call: Callable[..., int]) -> None:
    if not (find_spec("venv") and find_spec("ensurepip")):
        raise HouseError(f"{sys.executable} cannot make environments (no venv, ensurepip); on Debian and Ubuntu: apt install python3-venv")
    say(f"making the environment {venv}")
    base = getattr(sys, "_base_executable", sys.executable)
    if call([base, "-m", "venv", "--clear", venv]):
        raise HouseError(f"'{base} -m venv {venv}' failed; its words stand above")


def install(root: Path, python: Path, call: Callable[..., int]) -> None:
    say("installing what requirements.txt lists; PyTorch is large (some 6 GB with its GPU libraries), so the first time takes minutes")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    steps = (
        [*pip, "-r", root / "requirements.txt", "-c", root / "constraints.txt"],
        [*pip, "--no-deps", "--no-build-isolation", "-e", root],
        [python, "-m", "jupyterlab.labextensions", "disable", "--level=sys_prefix", NEWS],
    )
    for step in steps:
        if status := call(step):
            raise HouseError(
                f"installing failed (exit status {status}; the reason stands above). Mend it and run 'python3 -m cmlib setup' again: "
                "what has been downloaded is kept"
            )


def chromium(python: Path) -> str:
    """Where Chromium is: CMLIB_CHROMIUM, on the path, macOS's applications, or Playwright's own; "" where there is none."""
    if own := os.environ.get("CMLIB_CHROMIUM"):
        if not shutil.which(own):
            raise HouseError(f"CMLIB_CHROMIUM={own}: no such program")
        return own
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    for name in ("Chromium", "Google Chrome"):
        if (app := Path(f"/Applications/{name}.app/Contents/MacOS/{name}")).is_file():
            return str(app)
    own = ask(python, "from playwright.sync_api import sync_playwright as p\nwith p() as it: print(it.chromium.executable_path)")
    return own if own and Path(own).is_file() else ""
