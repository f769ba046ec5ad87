"""The data sets: read whole, checked against their sha256, split once and for all.

``load_data(name)`` gives the same three parts on every machine: ``train`` for fitting, ``validation`` for every
choice (sliders, early stopping, model selection) and ``test`` for final tables only. Images are uint8 tensors of shape
(N, channels, height, width) with black = 0; ``as_input`` turns them into the floats in [0, 1] that the networks take.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..core.inputs import Pair, stratified

DATASETS = Path(os.environ.get("CMLIB_DATASETS", Path(__file__).resolve().parents[2] / "datasets"))
CIFAR10 = "CMLIB_CIFAR10"  # the environment variable that names CIFAR-10's folder or file
VALIDATION = 5_000

CLASSES = {
    "mnist": tuple("0123456789"),
    "digits": tuple("0123456789"),
    "fashion_mnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}

IDX_SHA256 = {
    "mnist/train-images-idx3-ubyte.gz": "71524e2cd1ad2968737f7f2f2ff69cbfc32df8ccddff51593f7cb2d4e0eb5b64",
    "mnist/train-labels-idx1-ubyte.gz": "fe03b8bd7915f70bf5aa08be480aa413fbd85afcaa58b35d230d335f284fd88e",
    "mnist/t10k-images-idx3-ubyte.gz": "5634745efa576a17e7d4cf5cd9d09123c75e6538e5114267c2d156edaf519341",
    "mnist/t10k-labels-idx1-ubyte.gz": "ae18e77e031ccde52407f794d123116439864147d33ac992975f85dd4dc42af6",
    "fashion_mnist/train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "fashion_mnist/train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "fashion_mnist/t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "fashion_mnist/t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class DataError(ValueError):
    """A data set is missing, half written, altered or not known; the message says what mends it."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its three fixed parts, each a pair (images uint8 (N, C, H, W), labels int64 (N,))."""

    name: str
    train: Pair
    validation: Pair
    test: Pair
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        parts = ", ".join(f"{p} {len(getattr(self, p)[1]):,}" for p in ("train", "validation", "test"))
        return f"Data({self.name}: {parts}; {len(self.classes)} classes, images {tuple(self.train[0].shape[1:])})"


def load_data(name: str, *, download: bool = False) -> Data:
    """The data set ``name``: one of mnist, fashion_mnist, digits, cifar10.

    Validation is 5,000 images, or 15 % of a smaller set, taken from the training part in equal shares a class by a fixed
    draw, so that it is the same on every machine. The second call returns the same object. Only CIFAR-10 does not ship: with ``download``
    torchvision fetches it once into the user's cache folder.

    Raises ``DataError`` where the name is unknown or the files are missing, cut or altered.
    """
    if name not in CLASSES:
        raise DataError(f"no data set {name!r}; there are {', '.join(CLASSES)}")
    return _load(name, _cifar10_source(download) if name == "cifar10" else "")


@lru_cache(maxsize=4)
def _load(name: str, source: str) -> Data:
    if name == "digits":
        train, test = _digits()
    elif name == "cifar10":
        train, test = _cifar10(source)
    else:
        train, test = (
            (_idx(f"{name}/{part}-images-idx3-ubyte.gz").unsqueeze(1), _idx(f"{name}/{part}-labels-idx1-ubyte.gz").long())
            for part in ("train", "t10k")
        )
    labels = train[1]
    held = stratified(labels, VALIDATION if len(labels) > 20_000 else round(0.15 * len(labels)), seed=0)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    return Data(name, _pair(train, rest), _pair(train, held), test, CLASSES[name])


def _pair(pair: Pair, rows: torch.Tensor) -> Pair:
    return pair[0][rows], pair[1][rows]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    """The file's bytes, if they are those that were published."""
    key = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DataError(f"{path} is missing; it ships with the project: restore it with 'git checkout -- datasets'")
    data = path.read_bytes()
    if sha256(data) != IDX_SHA256[key]:
        raise DataError(
            f"{path} is not the published file ({len(data):,} bytes, sha256 {sha256(data)[:12]}..., expected "
            f"{IDX_SHA256[key][:12]}...): half written or altered; restore it with 'git checkout -- datasets'"
        )
    return data


def _idx(key: str) -> torch.Tensor:
    """An idx file as a uint8 tensor: two zero bytes, type 8, the number of axes, their lengths, then the values."""
    raw = gzip.decompress(_read(DATASETS / key))
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * axes).reshape(shape)


def _digits() -> tuple[Pair, Pair]:
    """scikit-learn's 1,797 digits of 8 by 8, their 0..16 stretched to 0..255; every fifth of a stratified order is test.

    Read from its file: to import scikit-learn takes over a second.
    """
    if (found := find_spec("sklearn")) is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    table = np.loadtxt(Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1]).long()
    order = stratified(labels, len(labels), seed=1)
    test = torch.arange(len(order)) % 5 == 0
    return (images[order[~test]], labels[order[~test]]), (images[order[test]], labels[order[test]])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cmlib"


def _cifar10_source(download: bool) -> str:
    """Where CIFAR-10 is: as the environment says, else in the cache, where ``download`` puts it."""
    fetched = _cache() / "cifar10"
    if os.environ.get(CIFAR10):
        return os.environ[CIFAR10]
    if download:
        from torchvision.datasets import CIFAR10 as Torchvision

        try:
            Torchvision(fetched, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"CIFAR-10 could not be fetched ({error}); try again, or set {CIFAR10}") from error
    if not fetched.exists():
        raise DataError(
            f"CIFAR-10 does not ship with the kit: call load_data('cifar10', download=True), or set {CIFAR10} to torchvision's folder or to an "
            ".npz file of JPEGs (datasets/README.md names its arrays)"
        )
    return str(fetched)


def _cifar10(source: str) -> tuple[Pair, Pair]:
    """CIFAR-10 from torchvision's folder or from one npz file of JPEGs; decoded pixels are kept beside it for next time."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"{CIFAR10}={source}: no such folder or file")
    if path.is_file():
        return _cifar10_jpeg(path)
    from torchvision.datasets import CIFAR10 as Torchvision

    try:
        parts = [Torchvision(path, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(f"{CIFAR10}={source}: {error}; fill it with torchvision.datasets.CIFAR10(folder, download=True)") from error
    train, test = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts)
    return train, test


def _cifar10_jpeg(path: Path) -> tuple[Pair, Pair]:
    from PIL import Image

    cache = _cache()
    stamp = path.stat()
    kept = cache / f"cifar10-{sha256(f'{path.resolve()}{stamp.st_size}{stamp.st_mtime_ns}'.encode())[:16]}.npz"
    if not kept.exists():
        try:
            packed = np.load(path, allow_pickle=False)
            arrays = {}
            for part in ("train", "test"):
                jpeg, offset = packed[f"{part}_jpeg"].tobytes(), packed[f"{part}_offset"]
                pixels = [np.asarray(Image.open(io.BytesIO(jpeg[a:b])).convert("RGB")) for a, b in zip(offset[:-1], offset[1:])]
                arrays[part] = np.stack(pixels).transpose(0, 3, 1, 2)
                arrays[part + "_label"] = packed[f"{part}_label"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{CIFAR10}={path}: not an .npz of CIFAR-10 JPEGs ({error})") from error
        cache.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(kept.stem + f".{os.getpid()}.part.npz")
        np.savez(aside, **arrays)
        aside.replace(kept)
    found = np.load(kept, allow_pickle=False)
    train, test = ((torch.from_numpy(found[p]), torch.from_numpy(found[p + "_label"]).long()) for p in ("train", "test"))
    return train, test
