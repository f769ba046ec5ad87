"""A walk of the knobs over one network: each position a plan, its pictures, what was measured of it, and the words for it.

The panel (``cmlib.view.explorer``) is a walk with a browser attached; from code a walk does the same.
"""

from __future__ import annotations

import csv
import html
import inspect
import io
import math
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..core.apply import Plan, attach_plan, plan_of, weighted, with_plain_weights
from ..core.bake import bake
from ..core.channels import UntraceableError
from ..core.method import Method
from ..core.perforate import detach_places
from ..core.planner import PROVIDERS, Planner
from ..core.sites import detach_site
from ..lab.cost import multiply_adds
from ..lab.data import Data
from ..lab.files import length, save, sizes
from ..lab.measure import codes_in, latency
from ..lab.train import predict
from ..lab.zoo import checkpoint, load_net
from ..methods import catalog
from . import cards, words
from .live import Live
from .words import Dense, Speed, State, Step

SHOWN = 12  # flipped images that are shown
SLICES, ROUNDS = 3, 5  # the latency is timed in slices, each so many rounds
SEEN = 8  # plans that are kept for a hand that comes back
OWN = "a function of your own"  # the source of a method that is a plain function
NETS = {"linear": "linear softmax", "lenet300": "LeNet-300-100", "lenet5": "LeNet-5", "resnet": "residual net",
        "mlp": "64-32-10 net", "cnn": "small CNN"}  # fmt: skip
SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "8×8 digits", "cifar10": "CIFAR-10"}


class Walk:
    """One network, one method, and where the knobs have been. ``state`` is the position now, ``path`` all that were measured exactly."""

    def __init__(self, net: nn.Module, method: Method, data: Any, *, where: str = "*", layer: str | None = None, part: str = "validation",
                 title: str | None = None, **knobs: Any) -> None:  # fmt: skip
        self.method, self.data, self.where, self.part = method, data, where, part
        self.title = title or method.title or method.key
        self.start = method.bind(knobs)
        self.path: list[Step] = []
        self._take(net)
        self.layer = self._covered(layer or next(iter(self.planner.layers)))
        self.state = self._at(self.start)

    def _take(self, net: nn.Module) -> None:
        """Make ``net`` the network that the panel acts on."""
        self.net, self.source = net, shipped(net)
        self.planner = Planner(net, self.method, where=self.where, data=self.data)
        self._seen: OrderedDict[tuple, tuple[Plan, list[str]]] = OrderedDict()
        self.live = Live(net, self.data, part=self.part)
        self.before = {n: p for n, p in self.planner.previous.items() if n in self.planner.layers and (hasattr(p, "input") or hasattr(p, "computed"))}
        for name in self.before:  # a plan says itself what its layers read and which places they work out
            detach_site(self.live.model.get_submodule(name))
            detach_places(self.live.model.get_submodule(name))
        size = sizes_of(net)
        self.header_bytes = size["header"]
        covered = {n: size["layers"].get(n, w.nbytes) for n, w in self.planner.weights.items()}
        layer_bits = {n: 8 * held for n, held in covered.items()}
        self.dense = Dense(self.live.accuracy(), size["file"], multiply_adds(self.live.model, self.live.starts[0][0][:1]), layer_bits)
        self.rest_bytes = size["arrays"] - sum(covered.values())
        first, image = next(iter(weighted(net))), self._image()
        self.views = {n: cards.LayerView(n, w, image if n == first else None) for n, w in self.planner.weights.items()}
        self.pictured, self.maps = deepcopy(self.live.model), {}  # a model of this thread's own: the other may be measuring, other weights in place

    def _image(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of an image that the network's first layer reads pixel by pixel."""
        shape, (_, *inputs) = self.live.images.shape[1:], next(iter(weighted(self.net).values())).weight.shape
        return (math.prod(shape[:-2]), *shape[-2:]) if len(shape) > 1 and inputs == [math.prod(shape)] else None

    def _covered(self, layer: str) -> str:
        if layer not in self.planner.layers:
            raise ValueError(f"layer={layer!r} is not covered; the covered layers are {', '.join(self.planner.layers)}")
        return layer

    # what a position of the knobs means -------------------------------------------------------------------------

    @property
    def listed(self) -> bool:
        """Whether the method can be found by its key."""
        return catalog().get(self.method.key) is self.method

    @property
    def retrainable(self) -> bool:
        """Whether another process can find the network, the method and the data by name."""
        return bool(self.source) and self.listed and isinstance(self.data, Data) and self.data.name == self.source["data"]

    def look(self, knobs: dict[str, Any]) -> State:
        """The plan of these knobs and its size; nothing is measured yet."""
        knobs = self.method.bind(knobs)
        key = tuple(knobs.items())
        if key not in self._seen:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                plan = self.planner(**knobs)
            self._seen[key] = plan, [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        self._seen.move_to_end(key)
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        plan, warned = self._seen[key]
        return self._state(knobs, plan, warned=warned)

    def _state(self, knobs: dict[str, Any], plan: Plan, **more: Any) -> State:
        packed = sum(p.bits() for p in plan.values()) // 8
        return State(knobs, plan, self.pictured, packed, packed + self.rest_bytes + self.header_bytes, source=self.source, **more)

    def trained(self, state: State, net: nn.Module, training: dict[str, Any]) -> State:
        """The state that training made of ``state``, measured; ``net`` is the trained network."""
        found = self._state(state.knobs, plan_of(net), net=with_plain_weights(net), training=training, before=state)
        self._finish(found, predict(found.net, self.live.images).argmax(1))
        return found

    def move(self, **knobs: Any) -> State:
        """Go to these knobs (the others stay), measure the exact accuracy, and add the point to the path."""
        self.state = self._at({**self.state.knobs, **knobs})
        return self.state

    def _at(self, knobs: dict[str, Any]) -> State:
        """The state of these knobs, measured; the point joins the path."""
        state = self.look(knobs)
        self._finish(state, self.live.answers(state.weights, state.around))
        self.path.append(state.step())
        return state

    def _finish(self, state: State, answers: Tensor) -> None:
        """Everything that follows from the answers on all images; the size is that of the file that ``save`` would write."""
        state.answers = answers
        state.accuracy = (answers == self.live.labels).double().mean().item()
        dense, now = self.live.by_class(self.live.dense), self.live.by_class(answers)
        there = dense.isfinite().nonzero().flatten()  # a class may have no image
        order = there[(now - dense)[there].argsort(stable=True)[:3]].tolist()
        state.worst = [{"label": self.class_name(c), "dense": dense[c].item(), "now": now[c].item()} for c in order]
        state.file_bytes, state.weighed = length(state.net or self.pictured, {**self.planner.previous, **state.plan}), True
        self.header_bytes = state.file_bytes - state.packed_bytes - self.rest_bytes  # of the next one, nearly
        state.index = words.index_bits(state.plan)

    def class_name(self, c: int) -> str:
        return self.data.classes[c] if isinstance(self.data, Data) else str(c)

    def pictures(self, state: State) -> cards.Cards:
        """The cards of the pictured layer and the bars of all."""
        out, name = cards.Cards([], []), self.layer
        packed, view, after = state.plan[name], self.views[name], state.weights[f"{name}.weight"].detach().cpu()
        if codes_in(packed):
            out.add(view.levels(packed, after))
            out.add(view.stairs(after))
        else:
            out.add(view.histogram(packed))
        cards.input_stairs(out, name, packed)
        if packed.kept < view.weight.numel() or not state.coded:
            view.map(out, packed.places)
        view.strip(out, after)
        self._feature_maps(out, state)
        out.add(cards.bits(state.plan) if state.coded else cards.shares(state.plan))
        return out

    def _feature_maps(self, out: cards.Cards, state: State) -> None:
        x = self.live.starts[0][0][:1]
        if self.layer not in self.maps:
            conv = self.views[self.layer].weight.dim() == 4
            self.maps[self.layer] = cards.feature_maps(self.pictured, self.layer, x, {}, self.before) if conv else None
        if self.maps[self.layer] is not None:
            model, *changes = (state.net, {}, {}) if state.net else (self.pictured, state.weights, state.around)
            cards.maps_strip(out, self.layer, self.maps[self.layer], cards.feature_maps(model, self.layer, x, *changes))

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
        method = repr(key) if self.listed else f'{self.method.kind}("{OWN}", chapter="-")({key})' if self.method.paper == OWN else key
        changed = {n: v for n, v in state.knobs.items() if v != self.method.knobs[n].default or n == next(iter(state.knobs))}
        where = [f"where={self.where!r}"] if self.where != "*" else []
        data = f'data=load_data("{self.data.name}")' if isinstance(self.data, Data) else "data=data"
        asks = [data] if self._needs_data else []
        knobs = [f"{n}={v!r}" for n, v in changed.items()]
        made = f"compress({', '.join([net, method, *where, *asks, *knobs])})"
        training = ", ".join(f"{n}={v!r}" for n, v in state.training.items())
        return f"fit(model := {made}, {data[5:]}, {training}, keep_best=False)" if state.net else made

    @property
    def _needs_data(self) -> bool:
        """Whether the method is made from data: evidence, or what the layers read."""
        acts = inspect.signature(self.method.acts).parameters if self.method.acts else ()
        return bool({*self.method.asks, *acts} & {*PROVIDERS, "x"})

    def text(self, state: State | None = None) -> str:
        """The panel as plain text: the same figures for reading aloud, printing and grading."""
        state = state or self.state
        rows = self._rows(state)
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        body = "\n".join("  ".join(c.ljust(n) if i == 0 else c.rjust(n) for i, (c, n) in enumerate(zip(r, widths, strict=True))) for r in rows)
        return f"{self.title} · {self.method.paper}\n{self.subtitle()}\n{body}\n{self.line(state)}"

    def _rows(self, state: State) -> list[list[str]]:
        rows = [["", "dense", "now", "change"], *self.cells(state)]
        rows += [words.layer_row(n, p, self.dense.layer_bits[n] if state.coded else None) for n, p in state.plan.items()]
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
        """The path walked, one line a state: its knobs, epochs of retraining, weights kept, bits a weight and an input, bytes on disk, accuracy."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow([*self.method.knobs, "epochs", "weights_kept", "weight_bits", "activation_bits", "file_bytes", "accuracy"])
        table.writerows([*s.knobs.values(), s.epochs, s.kept, s.weight_bits, s.activation_bits, s.file_bytes, s.accuracy] for s in self.path)
        return out.getvalue()

    def subtitle(self) -> str:
        net = NETS[self.source["net"]] if self.source else f"{type(self.net).__name__} of your own"
        data = SETS.get(self.data.name, self.data.name) if isinstance(self.data, Data) else "data of your own"
        return f"{net} on {data} · {len(self.live.labels):,} {self.part} images · the knobs act on the network"

    def model(self, state: State | None = None) -> nn.Module:
        """A copy of the network with the state's plan attached: what ``line`` would make."""
        state = state or self.state
        return attach_plan(deepcopy(state.net or self.net), state.plan, None if state.net else self.method, state.knobs)

    def flips(self, state: State) -> tuple[dict[str, Any], bytes]:
        """The images whose answer just changed from right to wrong against the dense network."""
        labels, dense, answers = self.live.labels, self.live.dense, state.answers
        lost = ((dense == labels) & (answers != labels)).nonzero().flatten()
        gained = int(((dense != labels) & (answers == labels)).sum())
        images = self.live.images[lost[:SHOWN]]
        images = images if images.dim() == 4 else images[:, None] if images.dim() == 3 else images.new_empty(0, 1, 1, 1)
        images, palette = (images[:, :3].movedim(1, -1), "rgb") if images.shape[1] >= 3 else (images[:, 0], "grey")
        pictures = (images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).to(torch.uint8)).cpu()
        kinds = {"truth": labels, "before": dense, "after": answers}
        names = [{kind: self.class_name(int(of[i])) for kind, of in kinds.items()} for i in lost[: len(pictures)]]
        caption = f"{len(lost):,} image{'s' * (len(lost) != 1)} right before and wrong now; {gained:,} the other way"
        size = {"n": len(names), "h": pictures.shape[1], "w": pictures.shape[2], "palette": palette}
        return {**size, "buffer": 0, "labels": names, "total": len(lost), "caption": caption}, pictures.contiguous().numpy().tobytes()

    def speeds(self, state: State) -> Iterator[Speed]:
        """Operations, and the latency beside the dense network's: what takes too long for a moving hand, better known after each slice."""
        small, why = self._small(state)
        models, x = {"dense": with_plain_weights(self.net), "now": small or with_plain_weights(self.model(state))}, self.live.starts[0][0][:1]
        times, count, size = [], multiply_adds(models["now"], x), length(small, {}) if small else None
        for _ in range(SLICES):
            times.append(latency(models, x, ROUNDS, torch.get_num_threads()))
            known = pd.concat(times).groupby(level=0, sort=False).median()
            yield Speed(count, *known.ms, known.ratio["now"], size, why)

    def _small(self, state: State) -> tuple[nn.Module | None, str]:
        """The state's network without the filters that go whole, or None and why they cannot be taken out."""
        try:
            return bake(self.model(state), self.data) if state.whole else None, ""
        except UntraceableError as error:
            return None, str(error)


def shipped(net: nn.Module) -> dict[str, Any] | None:
    """How ``load_net`` gives this very network, weight by weight; None for any other, trained further or the user's own."""
    source = getattr(net, "source", None)
    if source is None or not checkpoint(**source).is_file():
        return None
    stored, held = load_net(**source).state_dict(), net.state_dict()
    return source if stored.keys() == held.keys() and all(torch.equal(stored[k], held[k].cpu()) for k in stored) else None


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """Bytes of the file that ``save`` writes for a model: in all, its header, its arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.cml"
        save(model, path)
        return sizes(path)
