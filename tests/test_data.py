"""The data sets: what they hold, that they never change, and what a broken or missing one says."""

import gzip
import hashlib
import os
import sys

import numpy as np
import pytest
import torch

from cmlib.core.inputs import as_input, pair_of
from cmlib.lab import data
from cmlib.lab.data import CIFAR10, DataError, load_data

SIZES = {"digits": (1221, 216, 360), "mnist": (55_000, 5_000, 10_000), "fashion_mnist": (55_000, 5_000, 10_000)}
PICTURES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}
FIXED = {  # the first digits of the sha256 of images and labels: train, validation, test
    "digits": ["6fc5c18570843063", "b097805428d4f74a", "1a6769461e97b711"],
    "mnist": ["9f25e48d1e95bec8", "634db5654b053810", "a0863a96c44e5666"],
    "fashion_mnist": ["3cacdfcaf32ad540", "abee74a7fb326d4a", "9a494dc49efeb996"],
}


def digest(*tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.numpy().tobytes())
    return h.hexdigest()[:16]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_types_and_the_black_that_is_zero(name):
    found = load_data(name)
    for part, size in zip(("train", "validation", "test"), SIZES[name], strict=True):
        images, labels = getattr(found, part)
        assert images.shape == (size, *PICTURES[name]) and images.dtype == torch.uint8
        assert labels.shape == (size,) and labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
        assert images.min() == 0 and images.max() == 255
    assert len(found.classes) == 10 and load_data(name) is found


@pytest.mark.parametrize("name", SIZES)
def test_the_split_is_the_same_on_every_machine(name):
    found = load_data(name)
    assert [digest(*getattr(found, part)) for part in ("train", "validation", "test")] == FIXED[name]


@pytest.mark.parametrize("name", SIZES)
def test_validation_is_stratified(name):
    found = load_data(name)
    held, rest = (torch.bincount(getattr(found, p)[1]).double() for p in ("validation", "train"))
    assert (held - len(found.validation[1]) * (held + rest) / (held + rest).sum()).abs().max() <= 1.5


@pytest.mark.parametrize("name", SIZES)
def test_no_image_is_in_two_parts(name):
    """Rows of the source, not pixels: Fashion-MNIST itself repeats a few pictures."""
    found = load_data(name)
    assert sum(len(getattr(found, p)[1]) for p in ("train", "validation", "test")) == sum(SIZES[name])
    prints = {p: {row.tobytes() for row in getattr(found, p)[0].numpy()} for p in ("train", "validation", "test")}
    shared = [
        len(prints["train"] & prints["validation"]),
        len(prints["train"] & prints["test"]),
        len(prints["validation"] & prints["test"]),
    ]
    assert max(shared) <= (2 if name == "fashion_mnist" else 0)


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    theirs = load_digits()
    pixels = np.round(theirs.images * (255 / 16)).astype(np.uint8)
    ours = sorted((x.tobytes(), int(y)) for part in (digits.train, digits.validation, digits.test) for x, y in zip(part[0].numpy(), part[1]))
    assert ours == sorted((x.tobytes(), int(y)) for x, y in zip(pixels, theirs.target, strict=True))


def test_digits_are_read_without_importing_scikit_learn_and_missed_where_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    data._digits()
    assert "sklearn" not in sys.modules
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="No module named 'sklearn'"):
        data._digits()


def test_input_is_x_over_255():
    assert as_input(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    own = torch.rand(3, dtype=torch.float64)
    assert as_input(own) is own


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """MNIST in a folder of the test's own."""
    (tmp_path / "mnist").mkdir()
    for path in (data.DATASETS / "mnist").glob("*.gz"):
        (tmp_path / "mnist" / path.name).symlink_to(path)
    monkeypatch.setattr(data, "DATASETS", tmp_path)
    data._load.cache_clear()
    yield tmp_path / "mnist"
    data._load.cache_clear()


def replace(path, raw):
    path.unlink()
    path.write_bytes(raw)


def test_a_cut_file_is_named(copies):
    path = copies / "train-labels-idx1-ubyte.gz"
    replace(path, path.read_bytes()[:-100])
    with pytest.raises(
        DataError, match=r"train-labels-idx1-ubyte.gz is not the published file \(28,778 bytes.*half written or altered.*git checkout"
    ):
        load_data("mnist")


def test_an_altered_file_is_named(copies):
    path = copies / "t10k-images-idx3-ubyte.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[5000] ^= 1
    replace(path, gzip.compress(bytes(raw), compresslevel=1))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is not the published file"):
        load_data("mnist")


def test_a_missing_file_is_named(copies):
    (copies / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is missing.*git checkout -- datasets"):
        load_data("mnist")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match=r"no data set 'imagenet'; there are mnist, digits, fashion_mnist, cifar10"):
        load_data("imagenet")


def test_cifar10_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv(CIFAR10, raising=False)
    with pytest.raises(DataError, match=r"CIFAR-10 does not ship.*CMLIB_CIFAR10.*torchvision.*npz"):
        load_data("cifar10")
    monkeypatch.setenv(CIFAR10, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere: no such folder or file"):
        load_data("cifar10")
    monkeypatch.setenv(CIFAR10, str(tmp_path))
    with pytest.raises(DataError, match=r"fill it with torchvision"):
        load_data("cifar10")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    monkeypatch.setenv(CIFAR10, str(tmp_path / "x.npz"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"x.npz: not an .npz of CIFAR-10 JPEGs"):
        load_data("cifar10")


def test_cifar10_reads_jpegs_and_keeps_the_pixels(monkeypatch, tmp_path):
    import io

    from PIL import Image

    def part(count, seed):
        pictures = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        files = [io.BytesIO() for _ in pictures]
        for f, p in zip(files, pictures, strict=True):
            Image.fromarray(p).save(f, "JPEG")
        raw = [f.getvalue() for f in files]
        return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)]), np.arange(count) % 10

    arrays = {}
    for name, count in (("train", 40), ("test", 20)):
        arrays[f"{name}_jpeg"], arrays[f"{name}_offset"], arrays[f"{name}_label"] = part(count, count)
    np.savez(tmp_path / "small.npz", **arrays)
    monkeypatch.setenv(CIFAR10, str(tmp_path / "small.npz"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = load_data("cifar10")
    assert [len(p[1]) for p in (first.train, first.validation, first.test)] == [34, 6, 20] and first.train[0].shape[1:] == (3, 32, 32)
    assert len(list((tmp_path / "cache" / "cmlib").iterdir())) == 1
    data._load.cache_clear()
    assert torch.equal(load_data("cifar10").train[0], first.train[0])
    data._load.cache_clear()


@pytest.mark.skipif(not os.environ.get(CIFAR10), reason=f"{CIFAR10} names no CIFAR-10 on this machine")
def test_cifar10_itself():
    found = load_data("cifar10")
    assert [tuple(p[0].shape) for p in (found.train, found.validation, found.test)] == [
        (45_000, 3, 32, 32),
        (5_000, 3, 32, 32),
        (10_000, 3, 32, 32),
    ]
    assert torch.bincount(found.validation[1]).tolist() == [500] * 10 and torch.bincount(found.test[1]).tolist() == [1000] * 10


def test_a_pair_stands_for_every_part():
    pair = torch.rand(4, 2), torch.zeros(4)
    assert pair_of(pair, "train")[0] is pair_of(list(pair), "test")[0]
    for wrong, said in (
        ("digits", r"a data set, as load_data\(name\) gives it, or a pair of tensors.*got str 'digits'"), (None, "got NoneType"),
        ((pair[0], pair[1], pair[1]), r"got \(Tensor, Tensor, Tensor\)"), ((pair[0], pair[1][:2]), "got 4 images and 2 labels"),
        ((pair[0][:0], pair[1][:0]), "got 0 images and 0 labels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            pair_of(wrong, "train")
