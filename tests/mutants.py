"""What the tests are worth: every method with faults planted in it, one at a time, and the test that notices.

``python -m cmlib mutants [KEY ...]`` prints the table. The faults are data beside the oracles: each ``tests/test_oracles_*.py`` has a list
``MUTATIONS`` of (key, file, text, replaced by, what is wrong then). A copy of the package gets one fault, the laws of that method and the file of its
oracles are run on it, and the first test to fail is named. A method without a fault, or a fault that nothing notices, is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from inspect import getsource
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
COPIED = ("cmlib", "tests")  # the rest of the tree is linked
SECONDS = 120  # for a test: a fault may make a loop endless, and that is noticed too
SERVER = get_context("forkserver")  # has imported once, before the first fault, what takes long and is not mutated
SERVER.set_forkserver_preload(["torch", "pytest", "numpy", "pandas", "scipy.stats", "sklearn.linear_model", "torch_pruning", "safetensors.torch"])


class Mutation(NamedTuple):
    key: str
    file: str
    text: str
    replaced: str
    fault: str
    oracles: str  # the test file that lists it


def listed(root: Path = ROOT) -> Iterator[Mutation]:
    """Every mutation of the oracle files. ValueError where a text does not stand exactly once in its file."""
    for path in sorted((root / "tests").glob("test_oracles_*.py")):
        for entry in getattr(import_module(path.stem), "MUTATIONS", ()):
            found = Mutation(*entry, f"tests/{path.name}")
            count = (root / found.file).read_text().count(found.text)
            if count != 1:
                raise ValueError(f"{path.name}: {found.key}: {found.text!r} stands {count} times in {found.file}")
            yield found


def copy_of(root: Path, to: Path) -> Path:
    """The tree at ``to``: what is mutated or run as files of its own, everything else as links."""
    for item in root.iterdir():
        if item.name in COPIED:
            shutil.copytree(item, to / item.name)
        elif not item.name.startswith("."):
            (to / item.name).symlink_to(item)
    return to


def caught_by(mutation: Mutation, tree: Path) -> str:
    """The first test that fails with the mutation in ``tree``, which is as before afterwards; "" where all pass."""
    path = tree / mutation.file
    sound = path.read_text()
    path.write_text(sound.replace(mutation.text, mutation.replaced))
    receives, sends = SERVER.Pipe(duplex=False)
    child = SERVER.Process(target=_tested, args=(mutation, tree, sends))
    try:
        child.start()
        sends.close()
        return receives.recv()
    except EOFError:
        return "the end of the process"
    finally:
        child.join()
        path.write_text(sound)


class First:
    """A pytest plugin: tests of a method before the others of its oracles' file, each within its time, and the first that fails."""

    def __init__(self, mutation: Mutation) -> None:
        self.mutation, self.failed = mutation, ""

    def pytest_collection_modifyitems(self, items):
        laws, key = f"tests/test_laws.py::test_law[{self.mutation.key}-", self.mutation.key
        about = {i: 0 if i.nodeid.startswith(laws) else 1 if key in i.nodeid or key in getsource(i.function) else 2 for i in items}
        items[:] = sorted((i for i in items if not about[i] or i.nodeid.startswith(self.mutation.oracles)), key=about.__getitem__)

    def pytest_runtest_setup(self):
        signal.alarm(SECONDS)

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or report.nodeid.removeprefix("tests/") * report.failed

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def _tested(mutation: Mutation, tree: Path, found: Connection) -> None:
    """In a process of its own: the laws and oracles of the mutated method."""
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    os.chdir(tree)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and some take long
    sys.path[:0] = [str(tree), str(tree / "tests")]
    sys.dont_write_bytecode = True  # of what stands there for a moment only
    signal.signal(signal.SIGALRM, _too_long)
    first = First(mutation)
    ended = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "tests/test_laws.py", mutation.oracles], plugins=[first])
    found.send(first.failed or ("" if ended == pytest.ExitCode.OK else f"pytest ended with {ended}"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cmlib mutants", description=__doc__.split("\n")[0])
    parser.add_argument("keys", nargs="*", metavar="KEY", help="methods to try; all of the catalogue by default")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args(arguments)
    from cmlib.methods import catalog

    wanted = asked.keys or list(catalog())
    if unknown := [key for key in wanted if key not in catalog()]:
        parser.error(f"no method {', '.join(unknown)}; catalog() lists them")
    mutations = [m for m in listed() if m.key in wanted]
    print("| method | planted fault | caught by | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(asked.jobs):
            (own := Path(folder) / str(job)).mkdir()
            trees.put(copy_of(ROOT, own))

        def tried(mutation: Mutation) -> str:
            tree, started = trees.get(), time.monotonic()
            found = caught_by(mutation, tree)
            trees.put(tree)
            print(f"| {mutation.key} | {mutation.fault} | {found or '**nothing**'} | {time.monotonic() - started:.0f} |", flush=True)
            return found

        with ThreadPoolExecutor(asked.jobs) as pool:
            results = list(pool.map(tried, mutations))
    bare, missed = [k for k in wanted if k not in {m.key for m in mutations}], results.count("")
    print(f"\n{len(results) - missed} of {len(results)} faults caught, in {len({m.key for m in mutations})} of {len(wanted)} methods.")
    if bare:
        print(f"No fault is planted in {', '.join(bare)}.")
    return int(bool(missed or bare))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
