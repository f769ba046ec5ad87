"""Channels: which filters stand or fall together, what follows them, and what reads them.

A filter is really gone only when its bias, the batch norm behind it, the filters that a shortcut or a depthwise convolution ties to it, and the
inputs that the next layers make of its map go too. The library torch-pruning works this out by tracing one forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .evidence import Evidence
from .inputs import as_input, device_of, dtype_of, pair_of
from .perforate import everywhere

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Vectors = tuple[tuple[str, int], ...]  # (parameter, where the layer's channels start in it)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that stand or fall together: channel c of every maker is one unit."""

    makers: tuple[str, ...]  # the layers whose output channels (filters, rows) they are
    vectors: Vectors  # biases of the makers, scales and shifts of the batch norms behind them
    norms: dict[str, int]  # {batch norm: where the channels begin in it}
    readers: dict[str, Tensor]  # {layer: (channels, inputs of the layer for each)}: who takes them in
    count: int  # how many channels
    own: dict[str, Vectors]  # {maker: its own bias and the batch norms right behind it}; they alone silence it where a sum adds others
    stuck: str = ""  # why these channels cannot go; empty where they can

    @property
    def first(self) -> str:
        """The maker that stands for the group."""
        return self.makers[0]


class UntraceableError(ValueError):
    """The network's channels cannot be followed; the message says where and what mends it."""


def example_of(model: nn.Module, data: Any = None) -> Tensor:
    """One input for ``model``: of ``data`` (a data set or a pair), else of the shape that the kit's networks carry with them."""
    if data is not None:
        return as_input(pair_of(data, "train")[0][:1], model).to(device_of(model), dtype_of(model))
    if not hasattr(model, "input_shape"):
        raise UntraceableError("which channels belong together is found by running one image through the network: pass data=(images, labels)")
    return torch.zeros(1, *model.input_shape, dtype=dtype_of(model), device=device_of(model))


def groups(model: nn.Module, example: Tensor, graph: Any = None) -> list[Group]:
    """The groups of a plain ``model``, in its own order, whose channels can go; read off its ``graph`` where the caller has one.

    UntraceableError where the forward pass cannot be followed.
    """
    return [g for g in all_groups(model, example, graph) if not g.stuck]


def all_groups(model: nn.Module, example: Tensor, graph: Any = None) -> list[Group]:
    """The same with those that are ``stuck``: the network's outputs, and channels on whose way something stands that cannot lose one."""
    names = {m: n for n, m in model.named_modules()}
    order = {n: i for i, n in enumerate(names.values())}
    raws = (graph or graph_of(model, example)).get_all_groups(root_module_types=list(LAYERS))
    found = [_group(raw, names, order) for raw in raws]
    return sorted((g for g in found if g.makers), key=lambda g: order[g.first])


def graph_of(model: nn.Module, example: Tensor) -> Any:
    """torch-pruning's dependency graph of ``model``."""
    import torch_pruning

    try:
        with everywhere(model), torch.inference_mode(False), torch.enable_grad():  # it follows what autograd records
            return torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)
    except Exception as error:
        raise UntraceableError(
            refusal(model, example)
            or f"torch-pruning cannot follow this network's forward pass ({type(error).__name__}: {error}), so no channel can be removed; "
            "unit='row' still masks filters where they stand"
        ) from error


def refusal(model: nn.Module, example: Tensor) -> str:
    """What the network itself says against the image; empty where it takes it."""
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        return f"the network refuses an image of shape {tuple(example.shape[1:])} ({said}); pass data=(images, labels) whose images it takes"
    return ""


def _group(raw: Any, names: dict[nn.Module, str], order: dict[str, int]) -> Group:
    """One of torch-pruning's groups in our words."""
    makers: dict[str, nn.Module] = {}
    norms: dict[str, nn.Module] = {}
    starts: dict[str, int] = {}
    behind: dict[str, list[str]] = {}
    readers: dict[str, Tensor] = {}
    count, stuck = 1 + max(i for item in raw for i in item.root_idxs), ""
    for item in raw:
        module, outward = item.dep.target.module, "out_channels" in item.dep.handler.__name__
        name = names.get(module)
        if name is None:
            continue
        stuck = stuck or _obstacle(name, module, item, count)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms[name], starts[name] = module, item.idxs[0]
        elif not isinstance(module, LAYERS) or len(item.idxs) % count:
            continue
        elif outward:
            makers[name], starts[name] = module, 0
            behind[name] = [names[n.module] for n in item.dep.target.outputs if isinstance(n.module, nn.modules.batchnorm._BatchNorm)]
        else:
            places = torch.tensor(item.idxs)[torch.tensor(item.root_idxs).argsort(stable=True)]
            readers[name] = places.reshape(count, -1)
    vectors = [(n, "bias") for n, m in makers.items() if m.bias is not None]
    vectors += [(n, p) for n, m in norms.items() for p in ("weight", "bias") if getattr(m, p) is not None]
    named = tuple((f"{n}.{p}", starts[n]) for n, p in vectors)
    own = dict.fromkeys(makers, named)
    if len(makers) > 1:
        own = {n: tuple(v for v in named if v[0].rpartition(".")[0] in (n, *behind[n])) for n in makers}
    stuck = stuck or ("" if readers else "they are the network's output")
    return Group(tuple(sorted(makers, key=order.__getitem__)), named, {n: starts[n] for n in norms}, readers, count, own, stuck)


def _obstacle(name: str, module: nn.Module, item: Any, count: int) -> str:
    """Why a module on the way of some channels cannot lose one of them; empty where it can."""
    if not isinstance(module, (*LAYERS, nn.modules.batchnorm._BatchNorm)):
        return f"{name} ({type(module).__name__}) is on their way"
    if 1 < getattr(module, "groups", 1) < module.in_channels:
        return f"{name} is a grouped convolution"
    if len(item.idxs) % count:
        return f"{name} reads them in unequal parts"
    return ""


class Structure:
    """The groups that a plan of filters covers: what is asked of one maker is asked of all that are tied to it."""

    def __init__(self, model: nn.Module, example: Tensor, covered: Iterable[str]) -> None:
        """ValueError where no covered layer has channels that can go; a warning where some stay for another reason than being the output."""
        covered = set(covered)
        found = all_groups(model, example)
        asked = [g for g in found if covered.intersection(g.makers)]
        self.groups = [g for g in asked if not g.stuck]
        reasons = [f"the channels of {', '.join(g.makers)} cannot go: {g.stuck}" for g in asked if g.stuck]
        if lost := sorted(covered.difference(*(g.makers for g in found))):
            reasons.append(
                f"what {', '.join(lost)} gives cannot be followed: it goes on through nothing that autograd records (numpy, detach), if at all"
            )
        if not self.groups:
            raise ValueError(f"{'; '.join(reasons) or 'no covered layer has channels of its own'}; unit='row' masks them all the same")
        for reason in (r for r in reasons if not r.endswith("output")):
            warnings.warn(reason, stacklevel=2)

    def tied(self, scores: Evidence) -> Evidence:
        """One score a group under its first maker's name: the mean over the makers that have one."""
        return {g.first: torch.stack([scores[n].flatten() for n in g.makers if n in scores]).mean(0) for g in self.groups}

    def spread(self, kept: dict[str, Tensor], scores: Evidence) -> dict[str, tuple[Tensor, Vectors]]:
        """{every maker: (its mask of rows, the vectors that go with them)}. Where a group would be empty its best channel stays, with a warning."""
        found = {}
        for g in self.groups:
            rows = kept[g.first]
            if not rows.any():
                rows = torch.zeros_like(rows).index_fill(0, scores[g.first].argmax(), True)
                warnings.warn(f"{g.first} would keep none of its {g.count} channels; its best one stays", stacklevel=2)
            found |= {n: (rows, g.vectors if n == g.first else ()) for n in g.makers}
        return found
