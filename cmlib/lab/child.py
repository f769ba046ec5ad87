"""Training beside a live panel: one thread, low priority, a process of its own that can be stopped and that ends with its parent.

A second two-thread torch job slows evaluation in the first one tenfold on two cores; a single low-priority thread hardly shows. The child
makes its model by name, so a job is a small json; it reports lines of json and leaves the trained model as a file. In a session of its own it
does not hear the interrupt that Jupyter sends to the kernel's group, nor the signal that ends the kernel: it looks whether its parent is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Child:
    """A running (or finished) training of a kit's network. ``report`` is its newest line; ``stop`` ends it."""

    def __init__(self, **job: Any) -> None:
        """``net, data, seed, method, where, knobs, training``: what to load, how to compress it, how to train (``fit``'s settings) what is left."""
        self.job = job
        self.folder = tempfile.TemporaryDirectory(prefix="cmlib-")
        self.path = Path(self.folder.name)
        (self.path / "job.json").write_text(json.dumps({**job, "parent": os.getpid()}))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.log = open(self.path / "log", "w")  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "cmlib.lab.child", self.folder.name]
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log, start_new_session=True)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failure(self) -> str:
        """Why it failed, or nothing."""
        code = self.process.poll()
        if code in (None, 0, -signal.SIGTERM):
            return ""
        return (self.path / "log").read_text().strip().split("\n")[-1] or f"the training ended with exit code {code} and said nothing"

    def report(self) -> dict[str, Any]:
        """Newest ``{"step", "steps", "accuracy"?, "bytes"?}``; empty before the first."""
        lines = [line for line in _text(self.path / "reports").split("\n") if line.endswith("}")]
        return json.loads(lines[-1]) if lines else {}

    def stop(self) -> None:
        if self.running:
            self.process.terminate()
            self.process.wait(10)
        self.log.close()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def orphaned(parent: int) -> bool:
    """Whether the process ``parent`` has ended: another one has then taken its place (on Windows none does, and a launcher may stand between)."""
    return os.name == "posix" and os.getppid() != parent


def main(folder: Path) -> None:
    """The child's side: load, compress, train, report, save."""
    import torch

    from ..core.training import Hook
    from .data import load_data
    from .files import save
    from .train import evaluate, fit
    from .verbs import compress
    from .zoo import load_net

    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)
    job = json.loads((folder / "job.json").read_text())
    data = load_data(job["data"])
    model = compress(load_net(job["net"], job["data"], job["seed"]), job["method"], where=job["where"], data=data, **job["knobs"])
    steps, training, interrupts = 0, job["training"], []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))  # raised in between steps: inside torch's own code one can get lost
    total = training["epochs"] * -(-len(data.train[1]) // training["batch"])
    with open(folder / "reports", "w") as reports:

        def say(**line: Any) -> None:
            reports.write(json.dumps(line) + "\n")
            reports.flush()

        def count(_: Any, __: Any) -> None:
            nonlocal steps
            if orphaned(job["parent"]):
                sys.exit("the process that asked for this training is gone")
            if interrupts:
                raise KeyboardInterrupt
            steps += 1
            if steps % 10 == 1:
                say(step=steps, steps=total)

        if fit(model, data, **training, hooks=[Hook(after=count)], keep_best=False).interrupted:
            sys.exit("the training was interrupted")
        size = save(model, folder / "model.cml")
        say(step=total, steps=total, accuracy=evaluate(model, data), bytes=size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
