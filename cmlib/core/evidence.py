"""What methods may ask for by naming a positional argument, and how each is worked out from a model and a sample of data.

Every provider is a function (model, layers, x, y, loss) -> {layer: tensor (or a function)} with no lasting effect on the model.
``w`` (the weight itself) and ``training`` (whether this is a training forward) need no provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Layers = dict[str, nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]
Evidence = dict[str, Tensor]

WHOLE_HESSIAN = 4_000  # weights; the inverse of LeNet-5's would take 0.74 TB
CHUNK = 32  # examples whose gradients are held at once
POSITIONS = 10  # places of a map that are looked at in each image (He et al. 2017 and Luo et al. 2017 sample so)
PROBES = 16  # random directions that stand for the output's Hessian where there are more outputs than this


def grad(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Gradient of the mean loss over the sample, summed before anything else is done to it. Shape of ``w``."""
    total: Evidence = {}
    for xs, ys in zip(x.split(256), y.split(256), strict=True):
        mean = loss(model(xs), ys) * (len(xs) / len(x))
        parts = torch.autograd.grad(mean, [m.weight for m in layers.values()], allow_unused=True)
        total |= {name: total.get(name, 0) + part for name, part in zip(layers, parts, strict=True) if part is not None}
    return total


def hess_diag(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Diagonal of the Gauss-Newton Hessian of the mean loss: E[J^T H_out J]_kk, exact up to 16 outputs. Shape of ``w``.

    It equals the Hessian's own diagonal where the model is linear in its weights, and is never negative.
    """
    total: Evidence = {}
    for gradients in _example_gradients(model, layers, x, y, loss):
        for name, (patches, delta) in gradients.items():
            if patches.shape[1] == patches.shape[3] == 1:  # one group, one position: an outer product, whose square is one too
                square = delta.flatten(1).square().T @ patches.flatten(1).square()
            else:
                square = _per_example(patches, delta).square().sum(0)
            total[name] = total.get(name, 0) + square.reshape(layers[name].weight.shape) / len(x)
    return total


def hess_rows(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Vectors whose mean outer product is the whole Gauss-Newton Hessian: shape (P, *w.shape), H = rows^T rows / P.

    ValueError above some 4,000 weights in all.
    """
    size = sum(layer.weight.numel() for layer in layers.values())
    if size > WHOLE_HESSIAN:
        raise ValueError(
            f"a Hessian of all {size:,} covered weights at once would have {size**2:,} entries; {WHOLE_HESSIAN:,} weights is the limit: "
            "cover fewer layers with where=..., or use layerwise_obs, which takes one layer at a time"
        )
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    count = 0
    for gradients in _example_gradients(model, layers, x, y, loss):
        count += len(next(iter(gradients.values()))[0]) if gradients else 0
        for name, (patches, delta) in gradients.items():
            rows[name].append(_per_example(patches, delta).reshape(-1, *layers[name].weight.shape))
    return {name: torch.cat(r) * (count / len(x)) ** 0.5 for name, r in rows.items() if r}


def acts_in(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What each layer reads, as it reads it: (examples, ...)."""
    with torch.no_grad(), _watched(layers) as seen:
        model(x)
    return {name: a for name, (a, _) in seen.items()}


def arriving(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What comes to each layer before any rounding of its inputs, (examples, ...)."""
    seen: Evidence = {}
    handles = [m.register_forward_pre_hook(lambda _, i, n=n: seen.__setitem__(n, i[0].detach().clone()), prepend=True) for n, m in layers.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def acts_gram(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Second moment of a layer's inputs, (groups, k, k): mean over examples (and positions) of patch patch^T, k weights an output."""
    total: Evidence = {}
    count: dict[str, int] = {}
    with torch.no_grad():
        for xs in x.split(CHUNK):
            with _watched(layers) as seen:
                model(xs)
            for name, (a, _) in seen.items():
                p = patches(layers[name], a).transpose(0, 1).transpose(2, 3).flatten(1, 2)  # (groups, examples x positions, k)
                total[name] = total.get(name, 0) + p.transpose(1, 2) @ p
                count[name] = count.get(name, 0) + p.shape[1]
    return {name: t / count[name] for name, t in total.items()}


def sensitivity(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """How much the outputs answer to a weight, (2, *w.shape): E|dy_k/dw|, averaged over the outputs k, and for the k that is the label."""
    total = {name: torch.zeros(2, *m.weight.shape).to(m.weight) for name, m in layers.items()}
    outputs = 0
    for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for k, gradients in enumerate(_example_gradients(model, layers, xs, ys, loss, _each_output)):
            for name, (patches, delta) in gradients.items():
                size = _per_example(patches, delta).abs()
                both = torch.stack([size.sum(0), size[ys == k].sum(0) if ys.dim() == 1 else 0 * size[0]])
                total[name] += both.reshape(total[name].shape) / len(x)
            outputs = max(outputs, k + 1)
    return {name: t / torch.tensor([outputs, 1.0]).to(t).reshape(2, *[1] * (t.dim() - 1)) for name, t in total.items()}


def macs(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """The multiply-adds that each weight takes part in for one example: the positions at which its layer is applied. Shape of ``w``."""
    with torch.no_grad(), _watched(layers) as seen:
        model(x[:1])
    return {name: torch.full_like(layers[name].weight, out.numel() / len(layers[name].weight)) for name, (_, out) in seen.items()}


def workload(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What every covered layer does for one example, (layers, 3) float64, the same for each: its weights, multiply-adds, numbers read and written."""
    with torch.no_grad(), _watched(layers) as seen:
        model(x[:1])
    weights = {name: layers[name].weight for name in layers if name in seen}
    rows = [[w.numel(), seen[n][1].numel() * w[0].numel(), sum(t.numel() for t in seen[n])] for n, w in weights.items()]
    return dict.fromkeys(weights, torch.tensor(rows, dtype=torch.float64, device=x.device))


def positions(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Of each place of a 2-D convolution's map, (2, H, W): the mean over examples of sum_c |V dL/dV|, and how many pooling windows read it.

    1 each where no max pooling follows. Zeros, (2, 1, 1), of a layer of another kind.
    """
    found = {name: torch.zeros(2, 1, 1).to(m.weight) for name, m in layers.items()}
    maps = {name: m for name, m in layers.items() if isinstance(m, nn.Conv2d)}
    for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True) if maps else ():
        with _watched(maps) as seen, _Pools(seen) as pools:
            cost = loss(model(xs), ys) * len(xs)
        outputs = [v for _, v in seen.values()]
        for name, v, g in zip(seen, outputs, torch.autograd.grad(cost, outputs, allow_unused=True), strict=True):
            impact = torch.zeros_like(v[0, 0]) if g is None else (v * g).detach().abs().sum((0, 1)) / len(x)
            found[name] = torch.stack([found[name][0] + impact, pools.reads.get(name, torch.ones_like(impact))])
    return found


class _Pools(TorchFunctionMode):
    """How often each place of a map is read by the max pooling behind it: {layer: (H, W)}."""

    def __init__(self, seen: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.seen, self.reads = seen, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        last = next(reversed(self.seen), None)  # the layer that ran last
        if func is F.max_pool2d and last is not None and self.seen[last][1].shape[2:] == args[0].shape[2:]:
            ones = torch.ones_like(self.seen[last][1][:1, :1], requires_grad=True)
            how = {n: kwargs[n] for n in ("stride", "padding", "ceil_mode")}
            sums = F.avg_pool2d(ones, args[1], **how, divisor_override=1)
            self.reads.setdefault(last, torch.autograd.grad(sums.sum(), ones)[0][0, 0])
        return func(*args, **(kwargs or {}))


def labels(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """The sample's labels, (examples,), the same for each layer."""
    return dict.fromkeys(layers, y)


def layer(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """The number of the layer that a weight belongs to, for methods that see all weights as one vector. Shape of ``w``."""
    return {name: torch.full(m.weight.shape, i, device=m.weight.device) for i, (name, m) in enumerate(layers.items())}


def place(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> dict[str, tuple[int, int]]:
    """(the layer's number among the covered ones, how many there are)."""
    return {name: (i, len(layers)) for i, name in enumerate(layers)}


def acts_rows(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What each layer's outputs at sampled places are products of: (samples, groups, k), k the weights of one output."""
    parts: dict[str, list[Tensor]] = {}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for xs in x.split(CHUNK):
            with _watched(layers) as seen:
                model(xs)
            for name, (a, _) in seen.items():
                columns = patches(layers[name], a)
                parts.setdefault(name, []).append(at_places(columns.flatten(1, 2), draw).unflatten(1, columns.shape[1:3]))
    return {name: torch.cat(p) for name, p in parts.items()}


def at_places(columns: Tensor, draw: torch.Generator) -> Tensor:
    """Of columns (examples, k, positions) those at a few random positions of each example: (samples, k)."""
    positions = torch.randint(columns.shape[2], (len(columns), min(POSITIONS, columns.shape[2])), generator=draw).to(columns.device)
    return columns.gather(2, positions[:, None].expand(-1, columns.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def quality(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Callable[[Tensor], float]]:
    """A function of all covered weights laid end to end: the network's accuracy with them (minus its loss where labels are no classes)."""

    def found(flat: Tensor) -> float:
        with torch.no_grad():
            z = _with_weights(model, layers, flat, x)
            return -loss(z, y).item() if y.is_floating_point() else (z.argmax(1) == y).double().mean().item()

    loss(model(x), y)  # images and labels that do not fit show at once
    return dict.fromkeys(layers, found)


def loss_at(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Callable[[Tensor], Tensor]]:
    """A function of all covered weights laid end to end: the network's mean loss with them, differentiable."""
    loss(model(x), y)  # as in ``quality``
    return dict.fromkeys(layers, lambda flat: loss(_with_weights(model, layers, flat, x), y))


def _with_weights(model: nn.Module, layers: Layers, flat: Tensor, x: Tensor) -> Tensor:
    """The outputs with the covered weights ``flat``, laid end to end."""
    shapes = {f"{name}.weight": m.weight.shape for name, m in layers.items()}
    parts = flat.to(x).split([s.numel() for s in shapes.values()])
    with in_evaluation(model):
        return torch.func.functional_call(model, {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}, x)


GATHERED = (
    grad,
    hess_diag,
    hess_rows,
    acts_gram,
    acts_in,
    arriving,
    sensitivity,
    macs,
    workload,
    positions,
    labels,
    layer,
    place,
    acts_rows,
    quality,
    loss_at,
)
OF_WEIGHTS = {"quality", "loss_at"}  # what the network does with other weights, which a plain copy takes
OF_INPUTS = {f.__name__ for f in (acts_in, arriving, acts_gram, acts_rows)}  # says nothing of single weights, whatever its shape
PROVIDERS: dict[str, Callable[..., Evidence]] = {f.__name__: f for f in GATHERED}


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _watched(layers: Layers) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Each layer's (input, output) of the forward passes inside the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, a: Tensor, out: Tensor) -> Tensor:
        if name in seen:
            raise ValueError(f"layer {name} is used more than once in a forward pass: no such evidence of it; leave it out with where=...")
        seen[name] = a.detach(), out
        return out.clone()  # what follows may overwrite it, as nn.ReLU(inplace=True) does

    handles = [m.register_forward_hook(lambda _, i, o, n=n: note(n, i[0], o)) for n, m in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _example_gradients(
    model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss, columns: Callable[[Tensor, Tensor, Loss], Tensor] | None = None
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """For chunks of examples and columns c of S: what makes up each example's d(z . S_c)/dw. S is a root of the output's Hessian by default."""
    for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        with _watched(layers) as seen:
            z = model(xs)
        outputs = [o for _, o in seen.values()]
        for column in (columns or _root)(z.detach(), ys, loss).unbind(2):
            deltas = zip(seen, torch.autograd.grad(z, outputs, column, retain_graph=True, allow_unused=True), strict=True)
            yield {name: (patches(layers[name], seen[name][0]), _grouped(layers[name], d)) for name, d in deltas if d is not None}


def _root(z: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """S with S S^T = the Hessian of each example's loss in its own outputs, (N, C, C); beyond 16 outputs, 16 random mixtures of its columns."""
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.grad(lambda zi, yi: loss(zi[None], yi[None]))))(z, y)
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]
    if root.shape[2] <= PROBES:
        return root
    signs = torch.randint(0, 2, (root.shape[2], PROBES), generator=torch.Generator().manual_seed(0)).to(root) * 2 - 1
    return root @ signs / PROBES**0.5


def _each_output(z: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Columns that pick one output each, (N, C, C)."""
    return torch.eye(z.shape[1]).to(z).expand(len(z), -1, -1)


def patches(layer: nn.Module, a: Tensor) -> Tensor:
    """What each output of a layer is a product of: (examples, groups, k, positions), k the weights of one output."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), 1, -1, a.shape[-1]).transpose(2, 3)
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"this evidence is for dense layers and 2-D convolutions with zero padding, not {layer}; leave it out with where=...")
    columns = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.unflatten(1, (layer.groups, -1))


def _grouped(layer: nn.Module, delta: Tensor) -> Tensor:
    """The gradient at a layer's output as (examples, groups, outputs of a group, positions)."""
    if isinstance(layer, nn.Linear):
        return delta.reshape(len(delta), 1, -1, delta.shape[-1]).transpose(2, 3)
    return delta.flatten(2).unflatten(1, (layer.groups, -1))


def _per_example(patches: Tensor, delta: Tensor) -> Tensor:
    """Each example's weight gradient: (examples, groups, outputs of a group, k)."""
    return delta @ patches.transpose(2, 3)
