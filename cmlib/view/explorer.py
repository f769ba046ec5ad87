"""The explorer: a method's knobs beside what they do to a real network, measured while the hand moves.

``explore(method, net=..., data=...)`` makes the panel. A move of a slider shows its picture at once, then an interval for the accuracy, then
the exact figure, and when the hand rests the latency. A newer move cancels what an older one had left to do; while one move follows another, the
exact figure waits for the hand to rest, so that the next picture finds the cores free.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from torch import nn

from ..core.codes import Codes
from ..core.knobs import Span
from ..core.method import Method, quantizer, score
from ..lab.child import Child
from ..lab.data import Data, load_data
from ..lab.files import load
from ..lab.measure import threads_at
from ..lab.runs import along
from ..lab.zoo import RECIPES, SEEDS, load_net
from ..methods import find
from . import words
from .walk import OWN, Walk
from .words import State

HERE = Path(__file__).parent
RUN = {"knobs", "training", "bytes", "accuracy"}  # what a stored run says
EPOCHS = (1, 3, 10, 30)  # of retraining, to choose from
REST = 0.35  # seconds without a move after which the hand rests
Work = Callable[..., Coroutine]


def _humbly() -> None:
    """Let this thread, and the threads that torch starts from it, give way: the browser and the server share the two cores."""
    torch.get_num_threads()  # torch sets a thread's number up when it is first asked, whatever was said before
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _looping() -> bool:
    """Whether an event loop runs, as in a notebook's kernel; in a script none does."""
    try:
        return bool(asyncio.get_running_loop())
    except RuntimeError:
        return False


WORKER = ThreadPoolExecutor(1, "cmlib-measuring", _humbly)  # one measurement at a time; torch releases the interpreter while it multiplies


STAGES = {"bn_gamma": ("resnet", "fashion_mnist"), "positions": ("lenet5", "mnist")}  # where there is what a method asks for


def explore(method: Method | str | Callable, net: nn.Module | str | None = None, data: Data | str | Any = None, **settings: Any) -> Explorer:
    """A panel in which ``method`` (a key of the catalogue, a method, or any function with annotated knobs) acts on a trained network.

    A function gives scores, or where it is annotated to return ``Codes``, those. ``net`` and ``data`` are names of the kit's, or a module and a pair
    (images, labels) or data set of your own; without them LeNet-300-100 on MNIST, LeNet-5 for a mask that is learned, or another that has what the
    method asks for. ``where`` names the covered layers, ``layer`` the pictured one, ``predict`` (a dict of knobs) asks for a guess before it tells
    the accuracy there. ``published`` are points {label, bytes, accuracy} beside the path; ``stored`` are runs trained once, {knobs, training (in
    words), bytes, accuracy}, shown as such: those that the kit has of the method on its own network and data, unless others are given. Bytes are of
    the file. Other keywords are starting values of knobs.
    """
    if callable(method) and not isinstance(method, Method):
        kind = quantizer if inspect.signature(method).return_annotation in (Codes, Codes.__name__) else score
        method = kind(OWN, chapter="-")(method)
    method = find(method)
    usual = ("lenet5" if method.learns_masks else "lenet300", "mnist")
    stage = next((STAGES[asked] for asked in method.asks if asked in STAGES), usual)
    data = data if data is not None else stage[1] if net is None else "mnist"
    net = stage[0] if net is None else net
    if isinstance(net, str) and not isinstance(data, (str, Data)):
        raise ValueError(f"net={net!r} names a network of the kit, whose data must be named too; with data of your own, pass a module")
    data = load_data(data) if isinstance(data, str) else data
    if isinstance(net, str):
        net = load_net(net, data.name)
    return Explorer(net, method, data, **settings)


class Explorer(Walk, anywidget.AnyWidget):
    """The panel that ``explore`` makes: a walk, and the conversation with the browser that shows it.

    ``move``, ``pin``, ``text``, ``line``, ``path_csv`` do from code what the hand does on the screen, and open views follow.
    """

    _esm = HERE / "panel.js"
    _css = HERE / "panel.css"
    spec = traitlets.Dict().tag(sync=True)
    _child: Child | None = None
    _task: asyncio.Task | None = None  # measures the state shown
    _training: asyncio.Task | None = None
    _guess: asyncio.Task | None = None

    def __init__(self, net: nn.Module, method: Method, data: Any, *, where: str = "*", layer: str | None = None,
                 predict: dict[str, Any] | None = None, published: Sequence[dict[str, Any]] = (), stored: Sequence[dict[str, Any]] | None = None,
                 part: str = "validation", title: str | None = None, **knobs: Any) -> None:  # fmt: skip
        self.predict, self.published, self._given = predict, list(published), None if stored is None else list(stored)
        if wrong := [run for run in self._given or () if not run.keys() >= RUN]:
            raise ValueError(f"a stored run has {', '.join(sorted(RUN))}; got one with {', '.join(wrong[0])}")
        method.bind(predict or {})
        self.pins: list[State] = []
        self.guesses: list[dict[str, Any]] = []
        self.seq, self._moved = 0, -math.inf
        WORKER.submit(torch.set_num_threads, torch.get_num_threads()).result()  # not those of a move, which has one
        Walk.__init__(self, net, method, data, where=where, layer=layer, part=part, title=title, **knobs)
        anywidget.AnyWidget.__init__(self, spec=self._spec())
        self.on_msg(self._receive)

    def _take(self, net: nn.Module) -> None:
        """Make ``net`` the network that the panel acts on, beside the runs that are stored of it."""
        super()._take(net)
        alike = self.retrainable and self.where == "*" and self.part == "validation" and self.data is load_data(self.data.name)
        kept = along(self.method.key, **self.source) if alike and self._given is None else ()
        beside = self.rest_bytes + self.header_bytes
        self.stored = self._given or [{**run, "bytes": run["bytes"] + beside} for run in kept]

    def _spec(self) -> dict[str, Any]:
        source = self.source
        return {
            "title": self.title, "paper": self.method.paper, "chapter": self.method.chapter, "subtitle": self.subtitle(),
            "knobs": [words.knob_spec(self.method.knobs[n], v) for n, v in self.start.items() if v is not None],
            "layer": {"choices": list(self.planner.layers), "value": self.layer, "label": "pictured layer"},
            "seed": {"choices": list(SEEDS), "value": source["seed"]} if source else None,
            "dense": {"accuracy": self.live.accuracy(), "bytes": self.dense.file_bytes},
            "published": self.published, "stored": self.stored, "line": self.line(),
            "walked": [words.point(s) for s in self.path],
            "predict": self._question() if self.predict else None,
            "train": {"label": "retrain", "title": "train what is left, in its own process", "epochs": EPOCHS} if self.retrainable else None,
        }  # fmt: skip

    def _question(self) -> dict[str, Any]:
        at = ", ".join(f"{k} = {v}" for k, v in self.predict.items())
        return {"question": f"What accuracy will be left at {at}?", "at": self.predict}

    def notes(self, state: State) -> list[dict[str, str]]:
        """What the figures mean, and what was stored of these knobs; a single run is told at any; none before a guess is made."""
        asked = self.predict and not self.guesses
        here = [run for run in self.stored if not asked and (len(self.stored) == 1 or run["knobs"].items() <= state.knobs.items())]
        untrained = [words.UNTRAINED] if self.method.learns_masks and not state.net else []
        return [*untrained, *(words.stored_note(run, state.knobs) for run in here), *super().notes(state)]

    # the conversation with the browser --------------------------------------------------------------------------

    def _receive(self, _: Any, message: dict[str, Any], __: list[bytes]) -> None:
        """A message from the browser. What goes wrong is shown in the panel, and the sliders stay alive."""
        answers = {"ready": self._on_ready, "move": self._on_move, "pin": self._on_pin, "unpin": self._on_unpin, "guess": self._on_guess,
                   "seed": self._on_seed, "clear": self._on_clear, "train": self._on_train, "stop": self._on_stop}  # fmt: skip
        try:
            answers[message["type"]](message)
        except Exception as error:  # whatever it is, the learner sees it and can go on
            self._say(message.get("seq", self.seq), error)

    def _on_ready(self, message: dict[str, Any]) -> None:
        """A view opened: show it where the kernel stands."""
        self.seq = max(self.seq, message.get("seq", 0))
        self._show()

    def _show(self) -> None:
        """Send the state to the views, what is known of it at once, the rest as it is measured."""
        self._picture(self.state)
        self._later(self._measure, self.seq, self.state)

    def move(self, **knobs: Any) -> State:
        """Go to these knobs (the others stay), measure the exact accuracy, and add the point to the path; open views follow."""
        state = super().move(**knobs)
        if _looping():
            self.seq += 1
            self._show()
        return state

    def _on_move(self, message: dict[str, Any]) -> None:
        self.seq, self._moved, before = message["seq"], time.monotonic(), self._moved
        with threads_at(1):  # waiting for a second thread takes longer than the work, when anything else runs
            knobs = self.method.bind({**self.start, **self._typed(message["knobs"])})
            layer = self._covered(message.get("layer") or self.layer)
            if knobs != self.state.knobs or (self.state.net and layer == self.layer):  # the knobs are of a plan, not of what training made of it
                self.state = self.look(knobs)
            self.layer = layer
            self._picture(self.state)
        self._later(self._measure, self.seq, self.state, self._moved - before < 2 * REST)

    def _typed(self, knobs: dict[str, Any]) -> dict[str, Any]:
        whole = {n for n, k in self.method.knobs.items() if isinstance(k.span, Span) and k.span.integer}
        return {n: int(v) if n in whole else v for n, v in knobs.items()}

    def _picture(self, state: State) -> None:
        """What is known at once: the pictures, the bytes, the table with what is not yet measured left open; and where, for other views."""
        found, size = self.pictures(state), {"bytes": state.file_bytes, "label": words.size_text(state.file_bytes)}
        where = {"knobs": {n: v for n, v in state.knobs.items() if v is not None}, "layer": self.layer}
        said = {"point": size, "cells": self.cells(state), "notes": self.notes(state), "line": self.line(state)}
        self.send({"type": "picture", "seq": self.seq, "cards": found.cards, **said, **where}, found.buffers)

    def _later(self, work: Work, *arguments: Any) -> None:
        """Start measuring in place of the measuring before it."""
        _cancel(self._task)
        self._task = self._begin(work, *arguments)

    def _begin(self, work: Work, *arguments: Any) -> asyncio.Task | None:
        """Start slow work in the kernel's own loop; where none runs (a script, a test), do it now."""
        told = self._told(self.seq, work, *arguments)
        return asyncio.get_running_loop().create_task(told) if _looping() else asyncio.run(told)

    async def _told(self, seq: int, work: Work, *arguments: Any) -> None:
        """Slow work; what goes wrong is shown in the panel."""
        try:
            await work(*arguments)
        except Exception as error:
            self._say(seq, error)

    def _say(self, seq: int, error: Exception) -> None:
        self.send({"type": "error", "seq": seq, "message": f"{type(error).__name__}: {error}"})

    async def _beside(self, work: Callable, *arguments: Any) -> Any:
        """Work done in the one worker thread, so that the kernel's loop is free for a newer move, which cancels what waits for it."""
        return await asyncio.get_running_loop().run_in_executor(WORKER, work, *arguments)

    async def _slices(self, work: Iterator) -> AsyncIterator:
        """What ``work`` yields, each step of it done beside: between two steps others have their turn."""
        while (found := await self._beside(next, work, None)) is not None:
            yield found

    async def _measure(self, seq: int, state: State, hurried: bool = False) -> None:
        """The exact accuracy of a state, with estimates on the way, and the slow figures when the hand rests; what is known is not measured again."""
        if state.accuracy is None:
            await self._count(seq, state, hurried)
        flips, picture = self.flips(state)
        self.send({"type": "exact", "seq": seq, **self._exact(state), "flips": flips}, [picture])
        if state.speed is None:
            await asyncio.sleep(REST)
            async for speed in self._slices(self.speeds(state)):
                best = speed
            state.speed = best
        self.send({"type": "rest", "seq": seq, "cells": self.cells(state), "notes": self.notes(state)})

    async def _count(self, seq: int, state: State, hurried: bool) -> None:
        """All images, a batch at a time; an estimate is sent where its interval has narrowed by a third; if ``hurried``, one will do till rest."""
        shown = 1.0
        async for step in self._slices(self.live.estimates(state.weights, state.around)):
            estimate, answers = step
            if estimate and not estimate.exact and estimate.half < 0.7 * shown:
                state.estimate, shown = estimate, estimate.half
                text = f"{words.pct(estimate.accuracy, 1)} ±{100 * estimate.half:.1f}"
                self.send({"type": "estimate", "seq": seq, "accuracy": estimate.accuracy, "half": estimate.half, "images": estimate.done,
                           "text": text, "cells": self.cells(state), "point": words.point(state)})  # fmt: skip
                if hurried:
                    await asyncio.sleep(REST)
                    hurried = False
        await self._beside(self._finish, state, answers)
        self.path.append(state.step())

    def _exact(self, state: State) -> dict[str, Any]:
        return {"accuracy": state.accuracy, "text": words.pct(state.accuracy), "cells": self.cells(state), "notes": self.notes(state),
                "point": words.point(state), "worst": state.worst}  # fmt: skip

    def _on_pin(self, _: dict[str, Any]) -> None:
        self.pin()

    def pin(self) -> None:
        """Keep the state shown for comparison; the two newest stay."""
        self.pins = [*self.pins, self.state][-2:]
        self._show_pins()

    def _on_unpin(self, _: dict[str, Any]) -> None:
        self.pins = []
        self._show_pins()

    def _show_pins(self) -> None:
        pins = [{"cells": [[c[0], c[2]] for c in self.cells(s)], "line": self.line(s), "point": words.point(s)} for s in self.pins]
        self.send({"type": "pinned", "pins": [{"label": label, **pin} for label, pin in zip("AB", pins)]})

    def _on_guess(self, message: dict[str, Any]) -> None:
        """Measure what was guessed: the knobs asked for, the others where the hand has them."""
        at = {**self.start, **self._typed(message.get("knobs", {})), **(self.predict or {})}
        self._guess = self._begin(self._reveal, message["value"], self.look(at))

    async def _reveal(self, guess: float, state: State) -> None:
        answers = torch.cat([part async for part in self._slices(self.live.batches(state.weights, state.around))])
        actual = (answers == self.live.labels).double().mean().item()
        self.guesses.append({"at": state.knobs, "guess": guess, "actual": actual})
        off = 100 * (guess - actual)
        verdict = "spot on" if abs(off) < 1 else f"{abs(off):.0f} points too {'high' if off > 0 else 'low'}"
        text = f"You said {words.pct(guess, 0)}; measured {words.pct(actual, 1)}: {verdict}."
        self.send({"type": "guess", "value": guess, "actual": actual, "text": text})

    def _on_seed(self, message: dict[str, Any]) -> None:
        """Another network of the kind: what is under way is of the old one and ends first."""
        net = load_net(self.source["net"], self.source["data"], int(message["value"]))
        self._end()
        self.send({"type": "train"})
        self._take(net)
        self.path.clear()
        self.state = self._at(self.state.knobs)
        self.spec = self._spec()
        self._on_ready({})

    def _on_clear(self, _: dict[str, Any]) -> None:
        self.path.clear()

    def _on_train(self, message: dict[str, Any]) -> None:
        """Train what the plan of these knobs leaves, in a child process."""
        if not self.retrainable:
            why = "retraining beside the panel needs a network, its data set and a method of the kit's, which a second process finds by name"
            raise ValueError(f"{why}; use fit(panel.model(), data)")
        if not _looping():
            raise RuntimeError("retraining beside the panel needs the event loop of a notebook; in a script use fit(panel.model(), data)")
        self._on_stop({})
        _cancel(self._training)
        recipe = RECIPES[self.source["net"]]
        training = {"epochs": message.get("epochs", 1), "lr": recipe["lr"], "batch": recipe["batch"]}
        self._child = Child(**self.source, method=self.method.key, where=self.where, knobs=self.state.knobs, training=training)
        self._training = self._begin(self._train, self._child, self.state.untrained)

    def _on_stop(self, _: dict[str, Any]) -> None:
        if self._child is not None:
            self._child.stop()

    async def _train(self, child: Child, state: State) -> None:
        while child.running:
            report = child.report()
            text = f"step {report['step']:,} of {report['steps']:,}" if report else "starting"
            self.send({"type": "train", "state": "running", "epoch": report.get("step", 0), "epochs": report.get("steps", 1), "text": text})
            await asyncio.sleep(0.4)
        report = child.report()
        if "accuracy" not in report:
            how = {"state": "failed", "text": child.failure} if child.failure else {"state": "stopped", "text": "stopped"}
            self.send({"type": "train", **how})
            return
        found = await self._beside(self._fetch, child, state)
        self.path.append(found.step())
        before = "not measured" if state.accuracy is None else words.pct(state.accuracy)
        text = f"retrained, {words.epochs(found.epochs)}: {words.pct(found.accuracy)} (before: {before})"
        self.send({"type": "train", "state": "done", "epoch": 1, "epochs": 1, "text": text, "point": words.point(found)})
        if self.state.untrained is state:  # the hand has not moved on
            self.state = found
            self._show()

    def _fetch(self, child: Child, state: State) -> State:
        """What a child has trained, as a state."""
        return self.trained(state, load(child.path / "model.cml"), child.job["training"])

    def _end(self) -> None:
        """End what runs beside the panel; nothing of it is heard any more."""
        self._on_stop({})
        _cancel(self._task, self._training, self._guess)

    def close(self) -> None:
        """End what runs beside the panel, then the widget."""
        self._end()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and beside it the text twin for pages where no widget runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": self.text(), "text/html": self.html()}, metadata


def _cancel(*tasks: asyncio.Task | None) -> None:
    for task in tasks:
        if task is not None:
            task.cancel()
