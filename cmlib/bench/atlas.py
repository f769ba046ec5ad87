"""The atlas: LeNet-5 on MNIST by every method that has a plan, at equal bytes, with the same short training; three seeds, and runs are kept.

A method's size is set by a knob of its own, on the first seed's network, so that the weights take at most ``SHARE`` of the dense ones' bytes and come
as near as the knob comes; what has no such knob is placed where it is. Then two rounds of training. Who learns its masks learns in the first and
trains what is left in the second; who rounds a portion of the weights rounds half of them before the first and the rest between the two; for all
others the rounds do not differ. Of two learning rates a method has the one that is better on the validation part with the first seed; where the size
itself is learned, and so depends on it, the higher. Methods that can leave the layers' inputs alone are told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pandas as pd
from torch import nn

from ..core.apply import plan_of, weighted
from ..core.bake import bake
from ..core.inputs import sample
from ..core.method import Method
from ..core.packed import Masked
from ..lab import runs
from ..lab.data import load_data
from ..lab.measure import input_bits
from ..lab.stages import turn
from ..lab.train import evaluate, fit
from ..lab.zoo import SEEDS, card, load_net, recipe
from ..methods import catalog, find
from .curves import DATA, DENSE, NET, learned, pruner
from .structures import PARTS, trained
from .tables import heading, line, percent

SHARE = 1 / 15  # two bits a weight, and room for scales, codebooks and columns
IMAGES, ROUNDS = 3_000, 2
SMALL = ("cnn", "digits")  # has batch norms, and few weights
TRAINING = {"batch": 32, "weight_decay": 0.0}
RATES = (3e-4, 3e-3)
NEAR = (0.9, 1.02)  # times the bytes asked for that count as these
CHANCE = 0.15  # test accuracy below which a network of ten classes says nothing
SIZE = {  # knobs that set a size, the first that a method has: whether more of it is more bytes
    "keep": True, "budget": True, "bits": True, "k": True, "word_bits": True, "low_bits": True, "max_bits": True, "mantissa_bits": True,
    "m_bases": True, "M_weight_bases": True, "c": False, "lam": False, "lambda_g": False, "gamma": False, "threshold": True,
}  # fmt: skip
STEPS, LEARNED_STEPS = 257, 65  # places on a knob that is no whole number; where each costs a round of training
STAGED = ("portion", "depth")  # what is turned up between the rounds
WEIGHTS_ALONE = {"a_bits": 32, "g_bits": 32, "mode": "bwn", "use": "weights"}  # wherever a method allows it
SHORT: dict[str, dict[str, Any]] = {  # where a default is made for longer training
    "sparse_variational_dropout": {"log_sigma2": -5.0}, "l0_hard_concrete": {"start": 0.33}, "admm_weight_pruning": {"every": 20},
    "structured_probabilistic_pruning": {"every": 10}, "global_dynamic_pruning": {"every": 10},
}  # fmt: skip


def atlas() -> Iterator[str]:
    """Test accuracy of every method at equal bytes, the best at the top."""
    for seed in SEEDS:
        for key in (DENSE, *methods()):
            if not refused(key):
                run(key, seed, better(key))
    found = table()
    yield from heading(
        f"LeNet-5 on MNIST by every method, the weights in at most {SHARE * dense_bytes():,.0f} of {dense_bytes():,} bytes, "
        f"after {ROUNDS} rounds of {IMAGES:,} images; three seeds, mean ± standard deviation",
        "method", "bytes of the weights", "bits a weight", "set by", "learning rate", "untrained", "validation", "test",
        "test, points beside dense", "remark",
    )  # fmt: skip
    dense = found[found.key == DENSE].test.mean()
    for key, lines in found.groupby("key", sort=False):
        one = lines.iloc[0]
        scores = [percent(lines[part]) for part in ("before", *PARTS)]
        change = f"{100 * (lines.test.mean() - dense):+.2f}"
        yield line(f"`{key}`", f"{lines.bytes.mean():,.0f}", f"{lines.bits.mean():.2f}", one.knob, one.rate, *scores, change, one.remark)
    for key, why in refusals().items():
        yield line(f"`{key}`", *[""] * 8, f"not applicable: {why}")
    yield f"\n{trained(found)}"


def methods() -> list[str]:
    """The keys of the methods that have a plan."""
    return [m.key for m in catalog().values() if not m.no_plan]


def table() -> pd.DataFrame:
    """The stored runs, a line a method and seed, the best on the test part first; nothing is trained.

    key, chapter, seed, knob ("keep = 0.052"), rate, before, validation, test (accuracies in [0, 1]; ``before`` any training, on validation), bytes,
    bits (a weight), remark, machine, date.
    """
    made = runs.table("atlas").rename(columns={"method": "key"}).sort_values(["key", "seed", "rate"], ignore_index=True)
    first = made[made.seed == SEEDS[0]]
    made = made[made.rate == made.key.map(first.loc[first.groupby("key").validation.idxmax()].set_index("key").rate)]
    lines = made.groupby("key")
    chapters = {m.key: m.chapter for m in catalog().values()}
    made = made.assign(
        chapter=made.key.map(chapters).fillna(""), knob=[setting(*pair) for pair in zip(made.key, made.knobs)],
        bits=32 * made.bytes / dense_bytes(), remark=made.key.map({key: remark(key, found) for key, found in lines}),
        mean=lines.test.transform("mean"),
    )  # fmt: skip
    return made.sort_values(["mean", "key", "seed"], ascending=[False, True, True], ignore_index=True).drop(columns="mean")


def refusals() -> dict[str, str]:
    """{method: why it is not in the table}: in its own words, or what to do instead where it has no plan; nothing is tried."""
    sizes = runs.table("atlas_size")
    said = dict(zip(sizes.method, sizes.refused)) | {m.key: m.no_plan for m in catalog().values() if m.no_plan}
    missing = dict.fromkeys(set(methods()) - set(sizes.method), "has no run yet; 'python -m cmlib bench --only atlas' makes it")
    return {key: why for key, why in (said | missing).items() if why}


def panels() -> dict[str, tuple[str, str]]:
    """{method: (network, data)} for its panel: where LeNet-5 has nothing for it, the small net of the digits has."""
    others = refusals()
    return {key: SMALL if key in others else (NET, DATA) for key in methods()}


def refused(key: str) -> str:
    """Why a method cannot be applied to LeNet-5, tried if it was not before; empty where it can."""
    return "" if key == DENSE else size(key)["refused"]


def setting(key: str, given: dict[str, Any]) -> str:
    """The size knob and its value, in words."""
    name = "" if key == DENSE else size_knob(find(key))
    return f"{name} = {given[name]:.3g}" if name else "no knob"


def remark(key: str, found: pd.DataFrame) -> str:
    """Why a method's place is not to be compared with the others' straight away; empty where it is."""
    if key == DENSE:
        return "the control"
    goal, said = SHARE * dense_bytes(), []
    if not NEAR[0] <= (times := found.bytes.mean() / goal) <= NEAR[1]:
        said.append(f"takes {times:.2g} times the bytes")
    if found.test.mean() < CHANCE:
        said.append("broke down: answers by chance")
    if (bits := found.inputs.min()) < 32:
        said.append(f"inputs of {bits:.0f} bit{'s' if bits > 1 else ''} too")
    return ", ".join(said)


def better(key: str) -> float:
    """The learning rate that is better on the validation part with the first seed."""
    return max(rates(key), key=lambda rate: run(key, SEEDS[0], rate)["validation"])


def rates(key: str) -> tuple[float, ...]:
    """The learning rates to choose from."""
    return RATES[-1:] if key != DENSE and learns_size(find(key)) else RATES


def run(key: str, seed: int, rate: float) -> dict[str, Any]:
    """What a method reaches with one seed; read if it was done before."""
    how = given(key, seed, rate)
    return runs.stored(how, partial(_run, how))


def given(key: str, seed: int, rate: float) -> dict[str, Any]:
    """What a run's result depends on."""
    return {"kind": "atlas", **_before(key, seed), "rate": rate, "knobs": {} if key == DENSE else knobs(key, seed, size(key))}


def _before(key: str, seed: int) -> dict[str, Any]:
    """What a run and the search for its size both depend on."""
    here = {"method": key, "seed": seed, "net": NET, "data": DATA, "checkpoint": card(NET, DATA, seed)["sha256"][:12]}
    return {**here, "images": IMAGES, "rounds": ROUNDS, **TRAINING}


def knobs(key: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """A method's knobs: its size as found, its draws by the seed, its inputs left alone where they can be."""
    own, method = WEIGHTS_ALONE | {"seed": seed}, find(key)
    told = {n: v for n, v in own.items() if n in method.knobs and v in method.knobs[n].span}
    return {**told, **SHORT.get(key, {}), **({found["knob"]: found["value"]} if found["knob"] else {})}


def size(key: str) -> dict[str, Any]:
    """Where a method's size knob stands for the bytes asked for: {knob ("" where it has none), value, bytes, refused (why it cannot be applied)}."""
    how = {"kind": "atlas_size", **_before(key, SEEDS[0]), "share": SHARE, "rate": RATES[-1] if learns_size(find(key)) else None}
    return runs.stored(how, partial(_size, how))


def size_knob(method: Method) -> str:
    """The knob that says how large a method's result is; empty where there is none."""
    return next((name for name in SIZE if name in method.knobs), "")


def learns_size(method: Method) -> bool:
    """Whether its size shows only once it has learned."""
    return method.learns_masks and size_knob(method) not in ("keep", "budget")


def _size(how: dict[str, Any]) -> dict[str, Any]:
    method, data, dense = find(how["method"]), *_given(SEEDS[0])
    name, goal, prune = size_knob(method), SHARE * dense_bytes(), pruner(dense, method, data)

    def made(value: Any) -> int:
        model = prune(knobs(method.key, SEEDS[0], {"knob": name, "value": value}))
        return held(learned(model, data, seed=SEEDS[0], **_round(how["rate"])) if learns_size(method) else model)

    try:
        tried = search(made, places(method, name), goal, not SIZE[name]) if name else {None: made(None)}
    except ValueError as error:
        return {"knob": name, "value": None, "bytes": 0, "refused": str(error)}
    value = nearest(tried, goal)
    return {"knob": name, "value": value, "bytes": tried[value], "refused": ""}


def places(method: Method, name: str) -> list[Any]:
    """Where a knob is tried: at every whole number, or evenly along its slider."""
    span = method.knobs[name].span
    return list(range(int(span.lo), int(span.hi) + 1)) if span.integer else span.points(LEARNED_STEPS if learns_size(method) else STEPS)


def search(made: Callable[[Any], int], values: list[Any], goal: float, shrinks: bool) -> dict[Any, int]:
    """{value: bytes} of the values that bisection tries on its way to the most bytes within the goal."""
    values, tried = values[::-1] if shrinks else values, {}
    low, high = 0, len(values) - 1
    while low <= high:
        middle = (low + high) // 2
        tried[values[middle]] = made(values[middle])
        low, high = (middle + 1, high) if tried[values[middle]] <= goal else (low, middle - 1)
    return tried


def nearest(tried: dict[Any, int], goal: float) -> Any:
    """The value with the most bytes within the goal; where none is within it, that with the fewest."""
    within = [value for value, size in tried.items() if size <= goal]
    return max(within, key=tried.__getitem__) if within else min(tried, key=tried.__getitem__)


@cache
def dense_bytes() -> int:
    """Bytes of the dense network's weights."""
    return held(load_net(NET, DATA))


def held(model: nn.Module) -> int:
    """Bytes that the weights take: as codes, as weights that stay and their places, whichever the method makes; filters that went whole take none."""
    plan = plan_of(model)
    if all(isinstance(p, Masked) for p in plan.values()):
        left = (layer.weight.detach() for layer in weighted(bake(model)).values())
        return sum(Masked(w, w != 0).bits() for w in left) // 8
    rest = sum(layer.weight.nbytes for name, layer in weighted(model).items() if name not in plan)
    return sum(p.bits() for p in plan.values()) // 8 + rest


def _given(seed: int) -> tuple[Any, nn.Module]:
    data = load_data(DATA)
    return replace(data, train=sample(data, IMAGES)), load_net(NET, DATA, seed)


def _round(rate: float) -> dict[str, Any]:
    """A round of training, as ``fit`` takes it."""
    return {**recipe(NET, DATA), **TRAINING, "epochs": 1, "lr": rate}


def _run(how: dict[str, Any]) -> dict[str, Any]:
    seed, (data, dense) = how["seed"], _given(how["seed"])
    method = None if how["method"] == DENSE else find(how["method"])
    staged = next((n for n in STAGED if method and n in method.knobs), None)
    prune = pruner(dense, method, data) if method else lambda _: deepcopy(dense)
    model = prune(how["knobs"])
    before, training = evaluate(model, data), _round(how["rate"])
    if staged:
        model = prune({**how["knobs"], staged: 0.5})
    if method and method.learns_masks:
        model = learned(model, data, seed=seed, **training)
    else:
        fit(model, data, seed=seed, **training)
    validation = fit(turn(model, **{staged: 1.0}) if staged else model, data, seed=seed + 1000, **training).best_accuracy
    inputs = min((input_bits(p) or 32 for p in plan_of(model).values()), default=32)
    scores = {"before": before, "validation": validation, "test": evaluate(model, data, part="test")}
    return {**scores, "bytes": held(model), "inputs": inputs}
