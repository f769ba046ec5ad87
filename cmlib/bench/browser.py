"""A real JupyterLab in a real Chromium, for the browser tests, the latency tables and the README's screenshot.

``lab(folder)`` starts a server on loopback with settings of its own and gives a page; server and browser end with the block.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def chromium() -> str | None:
    """The path of a Chromium or Chrome, or None; the environment variable CMLIB_CHROMIUM goes first."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CMLIB_CHROMIUM") or next((p for p in map(shutil.which, names) if p), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _settings(folder: Path) -> None:
    for name, values in SETTINGS.items():
        path = folder / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@contextmanager
def server(root: Path, command: tuple[str, ...] = ("jupyterlab",), timeout: float = 60) -> Iterator[str]:
    """A Jupyter server over ``root``; yields its address with a %s for the path. Ends with the block."""
    port, token = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as home:
        _settings(Path(home) / "settings")
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "JUPYTERLAB_SETTINGS_DIR": f"{home}/settings",
            "JUPYTER_CONFIG_DIR": f"{home}/config",
            "IPYTHONDIR": f"{home}/ipython",
        }
        arguments = [sys.executable, "-m", *command, "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}",
                     f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
                     *(["--allow-root"] if getattr(os, "geteuid", int)() == 0 and os.name == "posix" else [])]  # fmt: skip
        with open(Path(home) / "log", "w") as log:
            process = subprocess.Popen(arguments, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=root)
        try:
            _wait(f"http://127.0.0.1:{port}/api/status?token={token}", process, timeout, Path(home) / "log")
            yield f"http://127.0.0.1:{port}/%s?token={token}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: subprocess.Popen, timeout: float, log: Path) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the Jupyter server did not answer within {timeout:.0f} s:\n{log.read_text()[-2000:]}")


@contextmanager
def page(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


READY = """() => {
  const context = window.jupyterapp.shell.currentWidget?.sessionContext;
  return context?.isReady && context.session?.kernel?.connectionStatus === 'connected' && context.session.kernel.status === 'idle';
}"""


@contextmanager
def lab(root: Path, notebook: str, **size: int) -> Iterator[Any]:
    """JupyterLab with ``notebook`` (a path under ``root``) open and its kernel idle."""
    with server(root) as address, page(**size) as found:
        found.goto(address % f"lab/tree/{notebook}", wait_until="domcontentloaded")
        found.wait_for_function("window.jupyterapp && document.querySelector('.jp-NotebookPanel .jp-Cell')", timeout=90_000)
        found.wait_for_function(READY, timeout=90_000)
        yield found


DONE = """() => {
  const cells = [...document.querySelectorAll('.jp-NotebookPanel .jp-CodeCell')].filter(c => c.querySelector('.cm-content')?.innerText.trim());
  const prompts = cells.map(c => c.querySelector('.jp-InputPrompt').innerText);
  const failed = document.querySelector('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]');
  return !prompts.some(p => p.includes('*')) && (failed || prompts.every(p => /[0-9]/.test(p)));
}"""


def run_all(found: Any, timeout: float = 180) -> None:
    """Run every cell of the open notebook and wait until the kernel is idle again; RuntimeError with the first error's text."""
    found.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    found.wait_for_function(DONE, timeout=timeout * 1000)
    error = found.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')
    if error.count():
        raise RuntimeError(error.first.inner_text()[-1500:])


# A task that is posted in an animation frame's own callback runs when that frame has been laid out and painted: that is when a thing is drawn.
DRAWN = """(() => { const channel = new MessageChannel(), waiting = [];
  channel.port1.onmessage = () => waiting.shift()(performance.now());
  return (then) => { waiting.push(then); channel.port2.postMessage(0); }; })()"""
# The panel changes its data-* in the animation frame that draws them.
WATCH = (
    f"""(panel) => {{ const drawn = {DRAWN};"""
    + """
  const clock = window.cmlibClock = {pressed: [], asked: {}, seq: [], estimate: [], exact: []};
  panel.addEventListener('input', () => clock.pressed.push(performance.now()), true);
  new MutationObserver(() => { clock.asked[panel.dataset.asked] ??= clock.pressed.at(-1); }).observe(panel, {attributeFilter: ['data-asked']});
  const seen = {seq: panel.dataset.seq, estimate: panel.dataset.estimate, exact: panel.dataset.exact};
  new MutationObserver(() => { for (const k of ['seq', 'estimate', 'exact']) if (panel.dataset[k] !== seen[k]) {
      seen[k] = panel.dataset[k]; const v = +seen[k]; drawn((t) => clock[k].push([v, t])); } })
    .observe(panel, {attributes: true});
}"""
)


def moves(found: Any, panel: Any, knob: str = "knob-keep", count: int = 20, gap: float = 0.3, settle: float = 3.0) -> dict[str, list[float]]:
    """Press an arrow key on a slider ``count`` times, ``gap`` seconds apart; milliseconds from each press to its picture, estimate and exact figure.

    Each answer is timed from the press whose move it answers, after the frame in which it was drawn; a move that a newer one overtook has no time.
    """
    panel.evaluate(WATCH)
    slider = panel.locator(f'[data-role="{knob}"] input[type=range], input[type=range][data-role="{knob}"]').first
    slider.focus()
    for i in range(count):
        found.keyboard.press("ArrowLeft" if i % 20 < 10 else "ArrowRight")
        found.wait_for_timeout(gap * 1000)
    found.wait_for_timeout(settle * 1000)
    clock = found.evaluate("window.cmlibClock")
    asked = {int(seq): t for seq, t in clock["asked"].items() if t is not None}
    return {stage: [t - asked[seq] for seq, t in clock[stage] if seq in asked] for stage in ("seq", "estimate", "exact")}


def _answered(pressed: list[float], answers: list[list[float]]) -> list[float]:
    """Time from the last press before each answer to it: for a way that does not say which press it answers, the kindest reading."""
    found = []
    for _, t in answers:
        before = [p for p in pressed if p < t]
        if before:
            found.append(t - before[-1])
    return found


def hold(found: Any, panel: Any, knob: str = "knob-keep", presses: int = 40, rate: float = 30) -> dict[str, Any]:
    """Hold an arrow key: ``presses``, at ``rate`` a second as far as the browser follows. How many pictures were drawn, at what rate the presses
    came, and whether the last position is the one shown."""
    panel.evaluate(WATCH)
    slider = panel.locator(f'[data-role="{knob}"] input[type=range], input[type=range][data-role="{knob}"]').first
    slider.focus()
    start = time.perf_counter()
    for i in range(presses):
        found.keyboard.press("ArrowRight")
        found.wait_for_timeout(max(0.0, 1000 * ((i + 1) / rate - (time.perf_counter() - start))))
    seconds = time.perf_counter() - start
    found.wait_for_timeout(2_500)
    clock = found.evaluate("window.cmlibClock")
    shown = {panel.get_attribute(f"data-{k}") for k in ("asked", "seq", "exact")}
    position = slider.get_attribute("aria-valuetext")
    return {
        "shown": len(clock["seq"]),
        "rate": presses / seconds,
        "last": len(shown) == 1 and f"keep={position}" in panel.locator('[data-role="text-twin"]').text_content(),
    }


def plain_moves(found: Any, count: int = 20, gap: float = 0.3) -> list[float]:
    """The same for an ipywidgets slider beside an output area: milliseconds from key press to a new picture."""
    found.evaluate(
        f"""() => {{ const drawn = {DRAWN};"""
        + """
      const clock = window.plainClock = {pressed: [], drawn: []}, root = document.querySelector('.jp-NotebookPanel');
      document.addEventListener('keydown', e => { if (e.key.startsWith('Arrow')) clock.pressed.push(performance.now()); }, true);
      new MutationObserver(ms => { if (ms.some(m => [...m.addedNodes].some(n => n.querySelector && (n.matches('img') || n.querySelector('img')))))
          requestAnimationFrame(() => drawn((t) => clock.drawn.push([0, t]))); }).observe(root, {childList: true, subtree: true}); }"""
    )
    found.locator(".noUi-handle").first.focus()
    for i in range(count):
        found.keyboard.press("ArrowRight" if i % 20 < 10 else "ArrowLeft")
        found.wait_for_timeout(gap * 1000)
    found.wait_for_timeout(2_000)
    clock = found.evaluate("window.plainClock")
    return _answered(clock["pressed"], clock["drawn"])
