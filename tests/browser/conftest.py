"""One JupyterLab and one page for a module of browser tests; without a Chromium they are skipped, and say so once."""

import ast
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from cmlib.bench import browser

WHY = "no Chromium or Chrome on the path; install one, or name one in CMLIB_CHROMIUM"
FIGURES = """(panel) => ({
  seq: +panel.dataset.seq, exact: +panel.dataset.exact,
  accuracy: panel.querySelector('[data-role="twin-accuracy"]')?.textContent,
  bytes: panel.querySelector('[data-role="twin-bytes"]')?.textContent,
  line: panel.querySelector('[data-role="text-twin"] p code')?.textContent,
  error: panel.querySelector('[data-role="error"]').hidden ? '' : panel.querySelector('[data-role="error"]').textContent,
})"""
RESTED = """(panel) => panel.dataset.exact === panel.dataset.seq && +panel.dataset.seq >= 0
  && ![...panel.querySelectorAll('[data-role="table"] td')].some(cell => cell.textContent === '…')"""


def pytest_collection_modifyitems(items):
    """Browser tests come last: what is quick is told first."""
    items.sort(key=lambda item: "browser" in item.path.parts)
    if browser.chromium() is None:
        for item in items:
            if "browser" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=WHY))


def notebook(path, *cells):
    """A notebook of code cells at ``path``."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)


class Panel:
    """A panel on a page as a user without a mouse has it: focus, keys, text."""

    def __init__(self, page, number=0):
        self.page, self.root = page, page.locator('[data-role="panel"]').nth(number)
        self.root.wait_for(timeout=60_000)

    def part(self, role):
        return self.root.locator(f'[data-role="{role}"]')

    def wait(self, condition, argument=None, timeout=30):
        handle = self.root.element_handle()
        self.page.wait_for_function(f"([panel, argument]) => ({condition})(panel, argument)", arg=[handle, argument], timeout=timeout * 1000)

    def figures(self):
        return self.root.evaluate(FIGURES)

    def rested(self, after=-1):
        """The figures once all is measured, of a move later than ``after``."""
        self.wait("(panel, after) => +panel.dataset.seq > after", after)
        self.wait(RESTED)
        return self.figures()

    def press(self, role, *keys):
        """Keys on one control; the figures once the hand rests."""
        before = self.figures()["seq"]
        self.part(role).focus()
        for key in keys:
            self.page.keyboard.press(key)
        return self.rested(before)

    def type(self, role, text):
        """An exact value, typed."""
        before = self.figures()["seq"]
        self.part(role).focus()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")
        return self.rested(before)

    def table(self, role="table"):
        rows = self.part(role).locator("tr").all()
        return {cells[0]: cells[1:] for cells in ([c.inner_text().strip() for c in row.locator("th, td").all()] for row in rows)}


def answers(address):
    """Whether somebody is there, be it with a refusal."""
    try:
        urllib.request.urlopen(address, timeout=2).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def voila(folder, name, timeout=60):
    """The address of a notebook shown by Voila; the server ends with the block."""
    port = browser.free_port()
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "JUPYTER_CONFIG_DIR": str(folder / "config"), "IPYTHONDIR": str(folder / "ipython")}
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "voila", name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        end = time.monotonic() + timeout
        while not answers(f"{address}api/status"):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def kernel(page, code):
    """What an expression is in the kernel of the open notebook, as json."""
    run = """async (code) => {
      const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
      const future = kernel.requestExecute({code: '', silent: true, store_history: false, user_expressions: {found: code}});
      const reply = (await future.done).content.user_expressions.found;
      if (reply.status !== 'ok') throw new Error(reply.evalue);
      return reply.data['text/plain'];
    }"""
    return json.loads(ast.literal_eval(page.evaluate(run, f"__import__('json').dumps({code})")))
