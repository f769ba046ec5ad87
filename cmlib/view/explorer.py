"""The explorer: a method's knobs beside what they do to a real network, measured while the hand moves.

``explore(method, net=..., data=...)`` makes the panel. A move of a slider shows its picture at once, then an interval for the accuracy, then
the exact figure, and when the hand rests the file that ``save`` writes and the latency. A newer move cancels what an older one had left to do.
"""

from __future__ import annotations

import asyncio
import csv
import html
import io
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from torch import Tensor, nn

from ..core.apply import Planner, attach
from ..core.knobs import Span
from ..core.method import Method, score
from ..lab.child import Child
from ..lab.data import Data, load_data
from ..lab.files import save, sizes
from ..lab.measure import measure
from ..lab.zoo import SEEDS, load_net
from ..methods import catalog, find
from . import cards, words
from .live import Live
from .words import Dense, State

HERE = Path(__file__).parent
REST = 0.35  # seconds without a move before the slow figures are measured
HOPS = 12  # turns of the kernel's loop between two batches: what a message takes to arrive
SHOWN = 12  # flipped images that are shown
OWN = "a function of your own"  # the source of a method that is a plain function
NETS = {"linear": "linear softmax", "lenet300": "LeNet-300-100", "lenet5": "LeNet-5", "resnet": "residual net",
        "mlp": "64-32-10 net", "cnn": "small CNN"}  # fmt: skip
SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "8×8 digits", "cifar10": "CIFAR-10"}


def explore(method: Method | str | Callable, net: nn.Module | str = "lenet300", data: Data | str | Any = "mnist", **settings: Any) -> Explorer:
    """A panel in which ``method`` (a key of the catalogue, a method, or any function with annotated knobs) acts on a trained network.

    ``net`` and ``data`` are names of the kit's, or a module and a pair (images, labels) or data set of your own. ``where`` names the covered
    layers, ``layer`` the pictured one, ``predict`` (a dict of knobs) asks for a guess before it tells the accuracy there; other keywords are
    starting values of knobs.
    """
    if callable(method) and not isinstance(method, Method):
        method = score(OWN, chapter="-")(method)
    data = load_data(data) if isinstance(data, str) else data
    if isinstance(net, str):
        net = load_net(net, data.name)
    return Explorer(net, find(method), data, **settings)


class Explorer(anywidget.AnyWidget):
    """The panel that ``explore`` makes; ``move``, ``pin``, ``text``, ``line``, ``path_csv`` do from code what the hand does on the screen."""

    _esm = HERE / "panel.js"
    _css = HERE / "panel.css"
    spec = traitlets.Dict().tag(sync=True)
    _child: Child | None = None

    def __init__(self, net: nn.Module, method: Method, data: Any, *, where: str = "*", layer: str | None = None,
                 predict: dict[str, Any] | None = None, published: Sequence[dict[str, Any]] = (),
                 part: str = "validation", title: str | None = None, **knobs: Any) -> None:  # fmt: skip
        self.method, self.data, self.where, self.part = method, data, where, part
        self.title, self.predict, self.published = title or method.title or method.key, predict, list(published)
        self.start = method.bind(knobs)
        self.path: list[State] = []
        self.pins: list[State] = []
        self.guesses: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        self.seq, self._task, self._training = 0, None, None
        self._take(net)
        names = list(self.planner.layers)
        self.layer = layer or names[0]
        self._covered(self.layer)
        self.state = self.move(**self.start)
        super().__init__(spec=self._spec())
        self.on_msg(self._receive)

    def _take(self, net: nn.Module) -> None:
        """Make ``net`` the network that the panel acts on."""
        self.net = net
        self.planner = Planner(net, self.method, where=self.where, data=self.data)
        self.live = Live(net, self.data, part=self.part)
        size = sizes_of(net)
        self.header_bytes = size["header"]
        self.dense = Dense(self.live.accuracy(), size["file"])
        covered = sum(size["layers"].get(n, w.numel() * w.element_size()) for n, w in self.planner.weights.items())
        self.rest_bytes = size["arrays"] - covered
        self.views = {n: cards.LayerView(n, w) for n, w in self.planner.weights.items()}
        self.maps: dict[str, Tensor | None] = {}

    def _covered(self, layer: str) -> str:
        if layer not in self.planner.layers:
            raise ValueError(f"layer={layer!r} is not covered; the covered layers are {', '.join(self.planner.layers)}")
        return layer

    # what a position of the knobs means -------------------------------------------------------------------------

    @property
    def source(self) -> dict[str, Any] | None:
        """How the kit makes the network; None for one of the user's own."""
        return getattr(self.net, "source", None)

    @property
    def listed(self) -> bool:
        """Whether the method can be found by its key."""
        return catalog().get(self.method.key) is self.method

    def look(self, knobs: dict[str, Any]) -> State:
        """The plan of these knobs and its size; nothing is measured yet."""
        plan = self.planner(**knobs)
        with torch.no_grad():
            weights = {name: p.dense() for name, p in plan.items()}
        arrays = self.rest_bytes + sum(p.bits() for p in plan.values()) // 8
        return State(self.method.bind(knobs), plan, weights, arrays - self.rest_bytes, arrays + self.header_bytes, source=self.source)

    def move(self, **knobs: Any) -> State:
        """Go to these knobs (the others stay), measure the exact accuracy, and add the point to the path."""
        before = self.state.knobs if self.path else self.start
        state = self.look({**before, **knobs})
        answers = self.live.answers(state.weights)
        self._finish(state, answers)
        self.state = state
        return state

    def _finish(self, state: State, answers: Tensor) -> None:
        state.accuracy = (answers == self.live.labels).double().mean().item()
        dense, now = self.live.by_class(self.live.dense), self.live.by_class(answers)
        there = dense.isfinite().nonzero().flatten()  # a class may have no image
        order = there[(now - dense)[there].argsort(stable=True)[:3]].tolist()
        state.worst = [{"label": self.class_name(c), "dense": dense[c].item(), "now": now[c].item()} for c in order]
        if state not in self.path:
            self.path.append(state)

    def class_name(self, c: int) -> str:
        return self.data.classes[c] if isinstance(self.data, Data) else str(c)

    def pictures(self, state: State) -> cards.Cards:
        """The cards of the pictured layer and the bars of all."""
        out, name = cards.Cards([], []), self.layer
        packed, view = state.plan[name], self.views[name]
        mask = packed.mask.cpu()
        out.add(view.histogram(mask))
        view.map(out, mask, packed.kept)
        view.strip(out, state.weights[name].cpu())
        self._feature_maps(out, state)
        out.add(cards.shares(state.plan))
        return out

    def _feature_maps(self, out: cards.Cards, state: State) -> None:
        x = self.live.starts[0][0][:1]
        if self.layer not in self.maps:
            self.maps[self.layer] = cards.feature_maps(self.live.model, self.layer, x, {}) if self.views[self.layer].weight.dim() == 4 else None
        if self.maps[self.layer] is not None:
            cards.maps_strip(out, self.layer, self.maps[self.layer], cards.feature_maps(self.live.model, self.layer, x, state.weights))

    # what is said of it -----------------------------------------------------------------------------------------

    def cells(self, state: State) -> list[list[str]]:
        """The table: label, dense, now, change."""
        return words.cells(state, self.dense)

    def notes(self, state: State) -> list[dict[str, str]]:
        """What the figures mean, and why some did not move."""
        return words.notes(state, self.dense)

    def line(self, state: State | None = None) -> str:
        """The call that makes the state shown, from nothing."""
        state = state or self.state
        source = state.source
        net = f'load_net("{source["net"]}", "{source["data"]}", seed={source["seed"]})' if source else "net"
        key = self.method.key
        method = repr(key) if self.listed else f'score("{OWN}", chapter="-")({key})' if self.method.paper == OWN else key
        changed = {n: v for n, v in state.knobs.items() if v != self.method.knobs[n].default or n == next(iter(state.knobs))}
        where = [f"where={self.where!r}"] if self.where != "*" else []
        data = f'data=load_data("{self.data.name}")' if isinstance(self.data, Data) else "data=data"
        asks = [data] if set(self.method.asks) - {"w", "training"} else []
        knobs = [f"{n}={v!r}" for n, v in changed.items()]
        return f"compress({', '.join([net, method, *where, *asks, *knobs])})"

    def text(self, state: State | None = None) -> str:
        """The panel as plain text: the same figures for reading aloud, printing and grading."""
        state = state or self.state
        rows = self._rows(state)
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        body = "\n".join("  ".join(c.ljust(n) if i == 0 else c.rjust(n) for i, (c, n) in enumerate(zip(r, widths, strict=True))) for r in rows)
        return f"{self.title} · {self.method.paper}\n{self.subtitle()}\n{body}\n{self.line(state)}"

    def _rows(self, state: State) -> list[list[str]]:
        rows = [["", "dense", "now", "change"], *self.cells(state)]
        rows += [[f"kept in {n}", f"{p.mask.numel():,}", f"{p.kept:,}", words.pct(p.kept / p.mask.numel())] for n, p in state.plan.items()]
        classes = [[f"class {w['label']}", words.pct(w["dense"]), words.pct(w["now"]), f"{100 * (w['now'] - w['dense']):+.1f}"] for w in state.worst]
        return rows + classes

    def html(self) -> str:
        """The same as a table, read cell by cell."""
        head, *rows = [[html.escape(c) for c in r] for r in self._rows(self.state)]
        body = "".join(f'<tr><th scope="row">{r[0]}</th>{"".join(f"<td>{c}</td>" for c in r[1:])}</tr>' for r in rows)
        title, line = html.escape(f"{self.title} · {self.method.paper}. {self.subtitle()}"), html.escape(self.line())
        heads = "".join(f'<th scope="col">{c}</th>' for c in head)
        return f"<table><caption>{title}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table><p><code>{line}</code></p>"

    def path_csv(self) -> str:
        """The path walked, one line a state: its knobs, weights kept, bytes on disk, accuracy."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow([*self.method.knobs, "weights_kept", "file_bytes", "accuracy"])
        table.writerows([*s.knobs.values(), s.kept, s.file_bytes, s.accuracy] for s in self.path)
        return out.getvalue()

    def subtitle(self) -> str:
        source = self.source
        name = f"{NETS[source['net']]} on {SETS[source['data']]}" if source else f"{type(self.net).__name__} of your own"
        return f"{name} · {len(self.live.labels):,} {self.part} images · nothing here is replayed: the knobs act on the network"

    def _spec(self) -> dict[str, Any]:
        source = self.source
        return {
            "title": self.title, "paper": self.method.paper, "chapter": self.method.chapter, "subtitle": self.subtitle(),
            "knobs": [words.knob_spec(self.method.knobs[n], v) for n, v in self.start.items() if v is not None],
            "layer": {"choices": list(self.planner.layers), "value": self.layer, "label": "pictured layer"},
            "seed": {"choices": list(SEEDS), "value": source["seed"]} if source else None,
            "dense": {"accuracy": self.live.accuracy(), "bytes": self.dense.file_bytes},
            "published": self.published, "line": self.line(),
            "walked": [words.point(s) for s in self.path],
            "predict": self._question() if self.predict else None,
            "train": {"label": "retrain", "title": "train what is left for one epoch, in a process of its own"} if source and self.listed else None,
        }  # fmt: skip

    def _question(self) -> dict[str, Any]:
        at = ", ".join(f"{k} = {v}" for k, v in self.predict.items())
        return {"question": f"What accuracy will be left at {at}?", "at": self.predict}

    # the conversation with the browser --------------------------------------------------------------------------

    def _receive(self, _: Any, message: dict[str, Any], __: list[bytes]) -> None:
        """A message from the browser. What goes wrong is shown in the panel, and the sliders stay alive."""
        answers = {"ready": self._on_ready, "move": self._on_move, "pin": self._on_pin, "unpin": self._on_unpin, "guess": self._on_guess,
                   "seed": self._on_seed, "clear": self._on_clear, "train": self._on_train, "stop": self._on_stop}  # fmt: skip
        try:
            answers[message["type"]](message)
        except Exception as error:  # whatever it is, the learner sees it and can go on
            self.send({"type": "error", "seq": message.get("seq", self.seq), "message": f"{type(error).__name__}: {error}"})

    def _on_ready(self, message: dict[str, Any]) -> None:
        """A view opened: show it where the kernel stands."""
        self.seq = max(self.seq, message.get("seq", 0))
        self._picture(self.state)
        self._later(self._measure(self.seq, self.state))

    def _on_move(self, message: dict[str, Any]) -> None:
        self.seq = message["seq"]
        state = self.look({**self.start, **self._typed(message["knobs"])})
        self.layer, self.state = self._covered(message.get("layer") or self.layer), state
        self._picture(self.state)
        self._later(self._measure(self.seq, self.state))

    def _typed(self, knobs: dict[str, Any]) -> dict[str, Any]:
        whole = {n for n, k in self.method.knobs.items() if isinstance(k.span, Span) and k.span.integer}
        return {n: int(v) if n in whole else v for n, v in knobs.items()}

    def _picture(self, state: State) -> None:
        """What is known at once: the pictures, the bytes, the table with what is not yet measured left open; and where, for other views."""
        found, size = self.pictures(state), {"bytes": state.file_bytes, "label": words.size_text(state.file_bytes)}
        where = {"knobs": {n: v for n, v in state.knobs.items() if v is not None}, "layer": self.layer}
        said = {"point": size, "cells": self.cells(state), "notes": self.notes(state)}
        self.send({"type": "picture", "seq": self.seq, "cards": found.cards, **said, **where}, found.buffers)
        self.send({"type": "line", "seq": self.seq, "line": self.line(state)})

    def _later(self, work: AsyncIterator | Any) -> None:
        """Start slow work in the kernel's own loop, in place of the work before it."""
        if self._task is not None:
            self._task.cancel()
        try:
            self._task = asyncio.get_running_loop().create_task(work)
        except RuntimeError:  # no loop runs (a script, a test): do it now
            self._task = None
            asyncio.run(work)

    async def _measure(self, seq: int, state: State) -> None:
        shown = 1.0
        try:
            for estimate, answers in self.live.estimates(state.weights):  # noqa: B007 (the last answers are all of them)
                for _ in range(HOPS):  # let the kernel take a newer move, which cancels this
                    await asyncio.sleep(0)
                if estimate and not estimate.exact and estimate.half < 0.7 * shown:
                    state.estimate, shown = estimate, estimate.half
                    text = f"{words.pct(estimate.accuracy, 1)} ±{100 * estimate.half:.1f}"
                    self.send({"type": "estimate", "seq": seq, "accuracy": estimate.accuracy, "half": estimate.half, "images": estimate.done,
                               "text": text, "cells": self.cells(state), "point": words.point(state)})  # fmt: skip
            self._finish(state, answers)
            flips, picture = self._flips(answers)
            self.send({"type": "exact", "seq": seq, **self._exact(state), "flips": flips}, [picture])
            await asyncio.sleep(REST)
            await self._rest(state, seq)
        except Exception as error:
            self.send({"type": "error", "seq": seq, "message": f"{type(error).__name__}: {error}"})

    def _exact(self, state: State) -> dict[str, Any]:
        return {"accuracy": state.accuracy, "text": words.pct(state.accuracy), "cells": self.cells(state), "notes": self.notes(state),
                "point": words.point(state), "worst": state.worst}  # fmt: skip

    def _flips(self, answers: Tensor) -> tuple[dict[str, Any], bytes]:
        """The images whose answer just changed from right to wrong against the dense network."""
        labels, dense = self.live.labels, self.live.dense
        lost = ((dense == labels) & (answers != labels)).nonzero().flatten()
        gained = int(((dense != labels) & (answers == labels)).sum())
        images = self.live.images[lost[:SHOWN]]
        images = images[:, :1] if images.dim() == 4 else images[:, None] if images.dim() == 3 else images.new_empty(0, 1, 1, 1)
        pictures = (images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).to(torch.uint8)).cpu()
        kinds = {"truth": labels, "before": dense, "after": answers}
        names = [{kind: self.class_name(int(of[i])) for kind, of in kinds.items()} for i in lost[: len(pictures)]]
        caption = f"{len(lost):,} images right before and wrong now; {gained:,} the other way"
        size = {"n": len(names), "h": pictures.shape[-2], "w": pictures.shape[-1]}
        return {**size, "buffer": 0, "labels": names, "total": len(lost), "caption": caption}, pictures.contiguous().numpy().tobytes()

    async def _rest(self, state: State, seq: int | None = None) -> None:
        """What takes too long for a moving hand: the file that ``save`` writes, the latency beside the dense network's."""
        one = self.live.images[:1], self.live.labels[:1]
        state.row = measure(self.model(state), reference=self.net, data=one, rounds=15, threads=torch.get_num_threads())
        state.file_bytes = state.row.file_bytes
        self.send({"type": "rest", "seq": self.seq if seq is None else seq, "cells": self.cells(state), "notes": self.notes(state)})

    def model(self, state: State | None = None) -> nn.Module:
        """A copy of the network with the state's plan attached: what ``line`` would make."""
        state = state or self.state
        copy = deepcopy(self.net)
        for name, packed in state.plan.items():
            attach(copy.get_submodule(name), packed, self.method, state.knobs)
        return copy

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
        at = self.predict or message.get("knobs", {})
        actual = self.live.accuracy(self.look({**self.start, **at}).weights)
        self.guesses.append({"at": at, "guess": message["value"], "actual": actual})
        off = 100 * (message["value"] - actual)
        verdict = "spot on" if abs(off) < 1 else f"{abs(off):.0f} points too {'high' if off > 0 else 'low'}"
        text = f"You said {words.pct(message['value'], 0)}; measured {words.pct(actual, 1)}: {verdict}."
        self.send({"type": "guess", "value": message["value"], "actual": actual, "text": text})

    def _on_seed(self, message: dict[str, Any]) -> None:
        source = self.net.source
        self._take(load_net(source["net"], source["data"], int(message["value"])))
        self.path.clear()
        self.state = self.move(**self.state.knobs)
        self.spec = self._spec()
        self._on_ready({})

    def _on_clear(self, _: dict[str, Any]) -> None:
        self.path.clear()

    def _on_train(self, _: dict[str, Any]) -> None:
        """Train what the state shown leaves for one epoch, in a child process."""
        if self.source is None or not self.listed:
            why = "retraining beside the panel needs a network and a method of the kit's, which a second process finds by name"
            raise ValueError(f"{why}; use fit(panel.model(), data)")
        self._on_stop({})
        self._child = Child(**self.source, method=self.method.key, where=self.where, knobs=self.state.knobs, epochs=1)
        self._training = asyncio.get_running_loop().create_task(self._train(self._child, self.state))

    def _on_stop(self, _: dict[str, Any]) -> None:
        if self._child is not None and self._child.running:
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
        point = {"bytes": report["bytes"], "accuracy": report["accuracy"], "label": "retrained", "half": 0}
        before = "not measured" if state.accuracy is None else words.pct(state.accuracy)
        text = f"retrained for one epoch: {words.pct(report['accuracy'])} (before: {before})"
        self.trained.append({"knobs": state.knobs, **report})
        self.send({"type": "train", "state": "done", "epoch": 1, "epochs": 1, "text": text, "point": point})

    def close(self) -> None:
        """End what runs beside the panel, then the widget."""
        self._on_stop({})
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and beside it the text twin for pages where no widget runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": self.text(), "text/html": self.html()}, metadata


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """Bytes of the file that ``save`` writes for a model: in all, its header, its arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.cml"
        save(model, path)
        return sizes(path)
