"""The trained networks: how each was made, and how to get one.

``python -m cmlib train`` makes every checkpoint that ships, one file a network, data set and seed, and skips what is there
already, so that it can be stopped and started again. A checkpoint is a safetensors file of plain weights; the json beside it
holds its sha256, recipe, versions and measured accuracies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from .data import DATASETS, load_data, sha256
from .nets import NETS
from .train import evaluate, fit, shifted

CHECKPOINTS = DATASETS / "checkpoints"
SEEDS = (0, 1, 2)

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 12, "lr": 5e-3, "batch": 128, "weight_decay": 0.0, "shift": 0},
    "lenet300": {"epochs": 30, "lr": 2e-3, "batch": 128, "weight_decay": 0.05, "shift": 1},
    "lenet5": {"epochs": 12, "lr": 2e-3, "batch": 128, "weight_decay": 0.05, "shift": 2},
    "resnet": {"epochs": 12, "lr": 6e-3, "batch": 128, "weight_decay": 0.05, "shift": 2},
    "mlp": {"epochs": 60, "lr": 5e-3, "batch": 32, "weight_decay": 0.01, "shift": 0},
    "cnn": {"epochs": 60, "lr": 1e-2, "batch": 32, "weight_decay": 0.01, "shift": 0},
}
MIRRORED = {"fashion_mnist", "cifar10"}  # a mirrored boot is a boot; a mirrored 2 is nothing
SHIPPED = [
    *((net, "digits") for net in ("linear", "mlp", "cnn")),
    *((net, data) for net in ("linear", "lenet300", "lenet5", "resnet") for data in ("mnist", "fashion_mnist")),
]


class NetError(ValueError):
    """A network is not known or its checkpoint is missing or altered; the message says what mends it."""


def build(net: str, data: str, seed: int = 0) -> nn.Module:
    """The untrained network ``net`` for the pictures of ``data``, its starting weights drawn from ``seed``."""
    if net not in NETS:
        raise NetError(f"no network {net!r}; there are {', '.join(NETS)}")
    shapes = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "digits": (1, 8, 8), "cifar10": (3, 32, 32)}
    if data not in shapes:
        raise NetError(f"no data set {data!r}; there are {', '.join(shapes)}")
    if data == "digits" and net in ("lenet5", "resnet", "bireal", "lenet300"):
        raise NetError(f"{net} is not made for 8 by 8 digits; use linear, mlp or cnn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETS[net](shapes[data]).to(memory_format=torch.channels_last)
    model.source, model.input_shape = {"net": net, "data": data, "seed": seed}, shapes[data]
    return model.eval()


def checkpoint(net: str, data: str, seed: int) -> Path:
    return CHECKPOINTS / f"{net}-{data}-{seed}.safetensors"


def load_net(net: str, data: str, seed: int = 0) -> nn.Module:
    """The trained network ``net`` (linear, lenet300, lenet5, resnet; mlp and cnn on digits) for ``data``, in evaluation mode.

    Raises ``NetError`` where there is no such network, or where its checkpoint is missing, cut or altered.
    """
    model = build(net, data, seed)
    path = checkpoint(net, data, seed)
    command = f"python -m cmlib train --net {net} --data {data} --seed {seed}"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise NetError(f"{path.name} does not ship with the kit or is missing; make it with '{command}'")
    raw = path.read_bytes()
    if sha256(raw) != card(net, data, seed)["sha256"]:
        raise NetError(f"{path} is cut or altered (sha256 differs from its card's); restore it, or delete it and run '{command}'")
    model.load_state_dict(safetensors.torch.load(raw))
    return model


def card(net: str, data: str, seed: int = 0) -> dict[str, Any]:
    """What is known of a checkpoint: recipe, versions, sha256, accuracies on validation and test, seconds of training."""
    path = checkpoint(net, data, seed).with_suffix(".json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NetError(f"{path} is missing or cut ({error}); restore it, or delete it and run 'python -m cmlib train'") from error


def recipe(net: str, data: str) -> dict[str, Any]:
    """The settings of ``fit`` with which the network is trained on the data set."""
    found = RECIPES[net]
    augment = partial(shifted, by=found["shift"], flip=data in MIRRORED) if found["shift"] else None
    return {**{k: found[k] for k in ("epochs", "lr", "batch", "weight_decay")}, "augment": augment}


def train_net(net: str, data: str, seed: int = 0) -> dict[str, Any]:
    """Train one network from scratch by its recipe, store it, and return its card; does nothing where it is already stored."""
    path = checkpoint(net, data, seed)
    if path.is_file() and path.with_suffix(".json").is_file() and card(net, data, seed)["sha256"] == sha256(path.read_bytes()):
        return card(net, data, seed)
    parts, model = load_data(data), build(net, data, seed)
    run = fit(model, parts, **recipe(net, data), seed=seed, progress=partial(_say, path.stem, RECIPES[net]["epochs"]))
    if run.interrupted:
        raise KeyboardInterrupt
    raw = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
    found = {
        "net": net, "data": data, "seed": seed, "sha256": sha256(raw), "bytes": len(raw),
        "validation_accuracy": evaluate(model, parts), "test_accuracy": evaluate(model, parts, part="test"),
        "recipe": {**RECIPES[net], "optimizer": "AdamW", "schedule": "one tenth up, cosine down", "mirrored": data in MIRRORED},
        "best_epoch": run.best_epoch,
        "seconds": round(run.seconds, 1), "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__},
    }  # fmt: skip
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    write(path, raw)
    write(path.with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())
    return found


def _say(name: str, epochs: int, row: dict[str, float]) -> None:
    print(f"  {name}: epoch {row['epoch']} of {epochs}, validation {row['accuracy']:.2%}, {row['seconds']:.0f} s", end="\r", flush=True)


def write(path: Path, raw: bytes) -> None:
    """The whole file or none of it: written aside, then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(raw)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """``python -m cmlib train [--net N] [--data D] [--seed S]``: train what is missing of the networks that ship, or those named."""
    parser = argparse.ArgumentParser(prog="python -m cmlib train", description="Train checkpoints from scratch; those already stored are skipped.")
    parser.add_argument("--net", choices=list(NETS))
    parser.add_argument("--data", choices=["mnist", "fashion_mnist", "digits", "cifar10"])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    named = [(asked.net, asked.data)] if asked.net and asked.data else SHIPPED
    wanted = [(n, d) for n, d in named if asked.net in (None, n) and asked.data in (None, d)]
    for net, data in wanted:
        for seed in SEEDS if asked.seed is None else (asked.seed,):
            done = train_net(net, data, seed)
            print(
                f"{net} {data} seed {seed}: validation {done['validation_accuracy']:.2%}, test {done['test_accuracy']:.2%}, {done['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
