"""Chapter 04: LeNet-5 and the residual net in few bits, three seeds; runs are kept.

Each method starts from the trained network and is trained for one to three epochs, the dense control for three. Inputs of one bit need batch norms
before the signs: LeNet-5 gets them (``signed``), and in place of the residual net stands Bi-Real's form of it, which without its signs is linear and
so is trained from scratch; the residual net itself from scratch stands beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core import clusters
from ..core.apply import plan_of
from ..core.planner import covered
from ..lab import runs
from ..lab.data import load_data
from ..lab.nets import signed
from ..lab.stages import in_stages
from ..lab.train import evaluate, fit
from ..lab.verbs import compress
from ..lab.zoo import RECIPES, SEEDS, build, load_net, recipe
from .structures import PARTS, before, trained
from .tables import heading, line, percent

INNER = "*, !first, !last"
SIGNED = {"where": INNER, "net": "signed", "epochs": 3}  # inputs of one bit need a batch norm before each sign
METHODS: dict[str, dict[str, Any]] = {  # label -> method, its knobs, and where and how it is trained other than for one epoch at lr 1e-3
    "integer-only, 8 bits": {"method": "integer_only_quantization", "knobs": {"bits": 8, "per": "filter"}, "lr": 2e-4},
    "integer-only, 4 bits": {"method": "integer_only_quantization", "knobs": {"bits": 4, "per": "filter"}, "lr": 2e-4},
    "k-means, 4 bits": {"method": "vq_gong", "knobs": {"k": 16}},
    "DoReFa, 4 bits": {"method": "dorefa_net", "knobs": {"bits": 4, "a_bits": 32}},
    "INQ, 5 bits": {"method": "inq", "knobs": {"bits": 5}, "stages": [[0.5, 1], [0.75, 1], [1.0, 0]], "epochs": 2},
    "LQ-Nets, 2 bits": {"method": "lq_nets", "knobs": {"bits": 2, "a_bits": 32}},
    "TWN": {"method": "ternary_weight_networks", "knobs": {"per": "filter"}, "epochs": 2},
    "TTQ": {"method": "trained_ternary_quantization", "knobs": {}},
    "BinaryConnect": {"method": "binaryconnect", "knobs": {}},
    "BWN": {"method": "xnor_net", "knobs": {"mode": "bwn"}, "epochs": 2},
    "HWGQ, 1 and 2 bits": {"method": "hwgq", "knobs": {"a_bits": 2}, "where": INNER},
    "DoReFa, 1 and 2 bits": {"method": "dorefa_net", "knobs": {"bits": 1, "a_bits": 2}, "where": INNER},
    "XNOR-Net, 1 and 1 bit": {"method": "xnor_net", "knobs": {}, **SIGNED},
    "BNN, 1 and 1 bit": {"method": "bnn", "knobs": {}, **SIGNED},
    "Bi-Real, 1 and 1 bit": {"method": "bi_real_net", "knobs": {}, **SIGNED},
}
SHORTCUTS = {"where": "block*, !*shortcut*", "net": "bireal", "lr": 6e-3}  # from scratch: without its signs that net is linear
DENSE, SCRATCH = "the dense net", "the dense net from scratch"
MOST = 3  # epochs, which the dense control has
SETS = {"lenet5": ("mnist", SEEDS), "resnet": ("fashion_mnist", SEEDS)}
LABELS = (DENSE, SCRATCH, *METHODS)
ALONG: dict[str, list[dict[str, Any]]] = {  # sliders of the panel, and where on them a network was trained
    "vq_gong": [{"k": 2**b} for b in (8, 5, 4, 3, 2, 1)],
    "integer_only_quantization": [{"bits": b, "per": "filter", "a_bits": 32} for b in (8, 5, 4, 3, 2)],
}


def quantized() -> Iterator[str]:
    """Accuracy and bytes of every method, LeNet-5 on MNIST and the residual net on Fashion-MNIST."""
    for net, (data, seeds) in SETS.items():
        for seed in seeds:
            for label in LABELS:
                run(net, label, seed)
        found = runs.of([given(net, label, seed) for seed in seeds for label in LABELS])
        yield from heading(
            f"{net} on {data}: weights (and inputs) of few bits, {len(seeds)} seed{'s, mean ± standard deviation' if len(seeds) > 1 else ''}",
            "method", "bits a covered weight", "epochs", "before them", "validation", "difference to dense, points", "test",
            "bytes of all parameters", "seconds a run, median",
        )  # fmt: skip
        dense = found[found.label == DENSE].validation.mean()
        for label in LABELS:
            lines = found[found.label == label]
            cells = [percent(lines[k]) for k in ("before", "validation", "test")]
            change = f"{100 * (lines.validation.mean() - dense):+.2f}"
            yield line(
                label,
                f"{lines.bits.mean():.2f}",
                lines.epochs.iloc[0],
                *cells[:2],
                change,
                cells[2],
                f"{whole_bytes(given(net, label, 0), round(lines.bytes.mean())):,}",
                f"{lines.seconds.median():.0f}",
            )
        yield f"\n{trained(found)} The machine was shared then, so that a run takes less time alone."


def run(net: str, label: str, seed: int) -> dict[str, Any]:
    how = given(net, label, seed)
    return runs.stored(how, partial(_run, how))


def given(net: str, label: str, seed: int) -> dict[str, Any]:
    data, settings = SETS[net][0], METHODS.get(label, {"method": None, "knobs": {}, "epochs": MOST})
    if label == SCRATCH:
        settings = {**settings, "net": "scratch", "lr": RECIPES[net]["lr"]}
    if net == "resnet" and settings.get("net") == "signed":
        settings = {**settings, **SHORTCUTS}
    here = {"kind": "quantized", "network": net, "data": data, "label": label, "seed": seed, "epochs": 1, "lr": 1e-3}
    return {**here, **settings, **({} if settings.get("net") in ("bireal", "scratch") else before(net, data, seed))}


def whole_bytes(how: dict[str, Any], held: int) -> int:
    """Bytes of all parameters and batch norms of a run's network, of whose covered weights ``held`` bytes are left."""
    model = start(how)
    weights = covered(model, how.get("where", "*")).values() if how["method"] else ()
    rest = sum(t.nbytes for t in model.state_dict().values()) - sum(layer.weight.nbytes for layer in weights)
    return rest + (held if how["method"] else 0)


def by_bits() -> Iterator[str]:
    """LeNet-5 along two sliders of the panel, with and without an epoch of training."""
    yield from heading("LeNet-5 on MNIST from 8 bits to 1, weights only, one more epoch, three seeds, mean ± standard deviation",
                       "method", "knobs", "bits a weight", "untrained", "validation", "test")  # fmt: skip
    for method, settings in ALONG.items():
        for knobs in settings:
            hows = [along(method, knobs, seed) for seed in SEEDS]
            for how in hows:
                runs.stored(how, partial(_run, how))
            found = runs.of(hows)
            scores = [percent(found[k]) for k in ("before", "validation", "test")]
            yield line(method, ", ".join(f"{k}={v}" for k, v in knobs.items()), f"{found.bits.mean():.2f}", *scores)


def along(method: str, knobs: dict[str, Any], seed: int) -> dict[str, Any]:
    here = {"kind": "by_bits", "network": "lenet5", "data": "mnist", "method": method, "knobs": knobs, "seed": seed, "epochs": 1, "lr": 2e-4}
    return {**here, **before("lenet5", "mnist", seed)}


def start(how: dict[str, Any]) -> nn.Module:
    """The network that a run starts from: a trained one, for signs with batch norms; an untrained one, Bi-Real's form or the network itself."""
    if how.get("net") in ("bireal", "scratch"):
        return build("bireal" if how["net"] == "bireal" else how["network"], how["data"], how["seed"])
    model = load_net(how["network"], how["data"], how["seed"])
    return signed(model) if how.get("net") == "signed" else model


def _run(how: dict[str, Any]) -> dict[str, Any]:
    data, model = load_data(how["data"]), start(how)
    training = {"lr": how["lr"], "augment": recipe(how["network"], how["data"])["augment"], "seed": how["seed"]}
    small = compress(model, how["method"], where=how.get("where", "*"), data=data, **how["knobs"]) if how["method"] else model
    before = evaluate(small, data)
    if "stages" in how:
        small, _ = in_stages(model, how["method"], data, "portion", how["stages"], knobs=how["knobs"], **training)
    else:
        fit(small, data, epochs=how["epochs"], **training)
    plan = plan_of(small)
    held = sum(p.bits() for p in plan.values()) // 8 if plan else sum(p.nbytes for p in small.parameters())
    bits = 8 * held / sum(p.values.numel() for p in plan.values()) if plan else 32.0
    return {"before": before, **{part: evaluate(small, data, part=part) for part in PARTS}, "bytes": held, "bits": bits}


def kmeans() -> Iterator[str]:
    """One-dimensional k-means beside scikit-learn's with one start, on weights drawn from a normal law and on LeNet-5's largest layer."""
    from sklearn.cluster import KMeans

    yield from heading(
        "One-dimensional k-means of 400,000 weights, one thread, ten seeds (ten draws of a normal law; LeNet-5's fc1, ten starts of scikit-learn's)",
        "weights", "levels", "milliseconds, median", "scikit-learn's, one start, seconds", "mean squared error over scikit-learn's", "bound",
    )  # fmt: skip
    fc1 = load_net("lenet5", "mnist").fc1.weight.detach().flatten()
    draws = {"normal": [torch.randn(400_000, generator=torch.Generator().manual_seed(seed)) for seed in range(10)], "fc1": [fc1] * 10}
    for name, weights in draws.items():
        for k in (16, 256):
            times, others, errors = [], [], []
            for seed, w in enumerate(weights):
                start = time.perf_counter()
                levels, index = clusters.Line(w).cluster(k)
                middle = time.perf_counter()
                theirs = KMeans(k, n_init=1, random_state=seed).fit(w[:, None].numpy())
                times.append(1e3 * (middle - start))
                others.append(time.perf_counter() - middle)
                errors.append(float(((w.double().numpy() - levels[index]) ** 2).sum()) / theirs.inertia_)
            shown = f"{statistics.mean(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})"
            yield line(name, k, f"{statistics.median(times):.0f}", f"{statistics.median(others):.1f}", shown, "300 ms; 1.005")
