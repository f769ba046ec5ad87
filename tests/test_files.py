"""A file is exactly as long as what it holds, gives back what was saved bit for bit, and nothing wrong with it passes."""

import hashlib
import json
import random
import tracemalloc
from copy import deepcopy

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from cmlib.core.apply import attach, plan_of
from cmlib.core.packed import Masked
from cmlib.lab import files
from cmlib.lab.files import FileError, load, save, sizes
from cmlib.lab.train import fit, predict
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build, checkpoint
from cmlib.methods import catalog

FORMATS = ("auto", "dense", "bitmap", "csr", "relative")
NETS = ("lenet300", "lenet5", "resnet")
SETTINGS = {"optimal_brain_surgeon": {"keep": 0.3, "damping": 1e-3}, "dynamic_network_surgery": {"c": 0.5}}
LEARNT = {m.key for m in catalog().values() if m.learns}


def pictures(n=16, side=28):
    return torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8), torch.arange(n) % 10


def tiny():
    """A user's own network: 4 x 6 convolution and dense weights, a batch norm, nothing of the kit's."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5)).eval()


def pruned(net="lenet300", data="mnist", keep=0.1, **how):
    return compress(build(net, data), "magnitude_pruning_han", keep=keep, **how)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def nets_of(method):
    """The digits' networks and the residual one; LeNet-5, with several places a channel and no batch norm, where what is behind a layer matters."""
    behind = method.training.gain or any(name.startswith("next_") for name in method.asks)
    scales = "bn_gamma" in method.asks
    return [*(["mlp"] if not scales else []), "cnn", "resnet", *(["lenet5"] if behind and not scales else [])]


@pytest.mark.parametrize("key, net", [(k, net) for k, m in catalog().items() if not m.no_plan for net in nets_of(m)])
def test_every_method_comes_back_as_it_was(key, net, path):
    on = "digits" if net in ("mlp", "cnn") else "mnist"
    data = pictures(side=8 if on == "digits" else 28)
    knobs = SETTINGS.get(key, {} if key in LEARNT or "keep" not in catalog()[key].knobs else {"keep": 0.1})
    where = {"mlp": "fc2", "cnn": "conv1", "resnet": "conv"}[net] if key == "optimal_brain_surgeon" else "*"  # its whole Hessian is asked for
    model = compress(build(net, on), key, where=where, data=data, **knobs)
    if key in LEARNT:
        fit(model, data, epochs=2)
    model.eval()
    length = save(model, path)
    assert length == path.stat().st_size
    back = load(path)
    assert torch.equal(predict(back, data[0]), predict(model, data[0]))
    saved, loaded = plan_of(model), plan_of(back)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[n].dense(), loaded[n].dense()) for n in saved)
    again = path.with_name("again")
    save(back, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("net", NETS)
def test_every_byte_is_accounted_for(net, storage, path):
    model = pruned(net, storage=storage, where="*, !last")
    length, found, plan = save(model, path), sizes(path), plan_of(model)
    assert found["layers"] == {name: packed.bits() // 8 for name, packed in plan.items()}
    assert all(packed.bits() % 8 == 0 for packed in plan.values())
    dense = build(net, "mnist").state_dict()
    assert found["rest"] == sum(t.nbytes for n, t in dense.items() if n.removesuffix(".weight") not in plan)
    assert length == path.stat().st_size == found["file"] == found["header"] + found["arrays"]
    assert found["arrays"] == sum(found["layers"].values()) + found["rest"]
    assert found["header"] == 8 + int.from_bytes(path.read_bytes()[:8], "little")
    kept = sum(p.kept for p in plan.values())
    values = sum(found["layers"].values()) - found["indices"]
    if storage == "dense":
        assert found["indices"] == 0
    elif storage in ("bitmap", "csr"):
        assert values == 4 * kept


def test_any_safetensors_reader_reads_it(path):
    save(pruned(storage="bitmap"), path)
    with safetensors.safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["cmlib"])
        names = set(file.keys())
    assert said["format"] == 1 and said["net"] == {"net": "lenet300", "data": "mnist", "seed": 0}
    assert said["layers"]["fc1"] == {"type": "masked", "storage": "bitmap", "shape": [300, 784]}
    assert names == {f"fc{i}.{part}" for i in (1, 2, 3) for part in ("bias", "weight|values", "weight|bitmap")}


def test_the_sha256_is_made_as_documented(path):
    save(pruned(), path)
    with safetensors.safe_open(path, "np") as file:
        said, arrays = json.loads(file.metadata()["cmlib"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    claimed = said.pop("sha256")
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        digest.update(f"\n{name}\ntorch.{arrays[name].dtype}\n{list(arrays[name].shape)}\n".encode() + arrays[name].tobytes())
    assert claimed == digest.hexdigest()


def test_a_dense_model_is_saved_and_loaded(path):
    model = build("resnet", "mnist", seed=3)
    save(model, path)
    back = load(path)
    assert same(model, back) and not plan_of(back) and back.source == model.source and not back.training
    assert back.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert sizes(path)["arrays"] == sum(t.nbytes for t in model.state_dict().values())


def test_saving_leaves_the_model_as_it_was(path):
    model = pruned().train()
    before = deepcopy(model)
    save(model, path)
    assert model.training and same(model, before)


def test_another_network_goes_into_a_fresh_one(path):
    torch.manual_seed(1)
    make = torchvision.models.resnet18
    model = compress(make(num_classes=7).eval(), "magnitude_pruning_han", keep=0.05, where="layer1*, fc")
    save(model, path)
    with pytest.raises(FileError, match="into="):
        load(path)
    fresh = make(num_classes=7).eval()
    assert load(path, into=fresh) is fresh
    x = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    assert plan_of(fresh).keys() == plan_of(model).keys()


def test_layout_mode_and_device_of_the_target_stay(path):
    save(compress(tiny(), "magnitude_pruning_han", keep=0.5), path)
    fresh = tiny().to(memory_format=torch.channels_last).train()
    load(path, into=fresh)
    assert fresh.training
    assert fresh[0].parametrizations.weight.original.stride() == tiny().to(memory_format=torch.channels_last)[0].weight.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_number_types(dtype, path):
    model = tiny().to(dtype)
    model = compress(model, "magnitude_pruning_han", keep=0.5) if dtype == torch.float64 else model
    save(model, path)
    back, x = load(path, into=tiny().to(dtype)), torch.rand(3, 1, 6, 6).to(dtype)
    assert torch.equal(model(x), back(x)) and back[3].weight.dtype == dtype
    with pytest.raises(FileError, match="float32"):
        load(path, into=tiny())


def test_what_two_names_share_is_stored_once(path):
    def shared():
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 6))
        model[3].bias = layer.bias
        return model

    model = compress(shared(), "magnitude_pruning_han", keep=0.5, where="0")
    save(model, path)
    found = sizes(path)
    assert found["rest"] == 4 * (6 + 36)
    back, x = load(path, into=shared()), torch.rand(3, 6)
    assert torch.equal(back(x), model(x)) and back[0] is back[2]


def test_a_weight_shared_with_a_layer_that_is_not_compressed(path):
    def tied():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model

    model = compress(tied(), "magnitude_pruning_han", keep=0.5, where="0")
    save(model, path)
    back, x = load(path, into=tied()), torch.rand(3, 6)
    assert torch.equal(back(x), model(x))


def test_a_layer_with_nothing_left(path):
    model = build("mlp", "digits")
    w = model.fc1.weight.detach()
    for storage in FORMATS[1:]:
        attach(model.fc1, Masked(w, torch.zeros_like(w, dtype=torch.bool), storage))
        save(model, path)
        assert plan_of(load(path))["fc1"].kept == 0


def test_a_network_of_the_kit_that_was_rebuilt_is_no_longer_the_kits(path):
    model = build("mlp", "digits")
    model.fc1, model.fc2 = nn.Linear(64, 9), nn.Linear(9, 10)
    save(model, path)
    with pytest.raises(FileError, match="into="):
        load(path)


def test_what_cannot_be_saved_leaves_the_old_file(path, tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    save(tiny(), path)
    before = path.read_bytes()
    with pytest.raises(FileError, match="_extra_state"):
        save(nn.Sequential(Odd(2, 2)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileError, match="cannot be saved"):
        save(tiny(), tmp_path / "no" / "such" / "folder")


# what is wrong with a file


def refused(path, match="cannot be loaded", into=None):
    """FileError, and the module to fill is as it was."""
    into = tiny() if into is None else into
    before = deepcopy(into)
    with pytest.raises(FileError, match=match):
        load(path, into=into)
    assert same(into, before)


@pytest.fixture
def small(path):
    torch.manual_seed(0)
    save(compress(tiny(), "magnitude_pruning_han", keep=0.3, storage="relative"), path)
    return path


def test_files_that_are_no_model(path, tmp_path):
    refused(path, "No such file")
    refused(tmp_path, "directory")
    for raw in (b"", b"\0" * 4, b"\0" * 100, b"PK\3\4" * 50, b"hello, this is a text and no network at all", b"\x80\x04\x95" * 40):
        path.write_bytes(raw)
        refused(path)
    refused(checkpoint("mlp", "digits", 0), "not a model saved by the kit")


def test_a_cut_or_lengthened_file(small):
    raw = small.read_bytes()
    for length in [*range(0, len(raw), 37), len(raw) - 1]:
        small.write_bytes(raw[:length])
        refused(small)
    small.write_bytes(raw + b"\0")
    refused(small)


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_counts(small, seed):
    raw, draw, into = small.read_bytes(), random.Random(seed), tiny()
    before = deepcopy(into)
    for place in range(seed, len(raw), 4):
        altered = bytearray(raw)
        altered[place] ^= draw.choice((1, 2, 4, 8, 16, 32, 64, 128, draw.randrange(1, 256)))
        small.write_bytes(altered)
        with pytest.raises(FileError):
            load(small, into=into)
    assert same(into, before)
    small.write_bytes(raw)
    load(small, into=into)


@pytest.mark.parametrize("blank", [b"\t", b"\n", b"\r"])
def test_even_the_padding_counts(small, blank):
    raw = small.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end].rstrip(b" ") + b" " * 8
    small.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    load(small, into=tiny())
    text = text[:-1] + blank
    small.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(small)


def forged(path, edit, arrays=None):
    """The file with its header (and arrays) changed by someone who knows how the sha256 is made."""
    header, tensors = files._read(path)
    header.pop("sha256")
    edit(header)
    tensors |= arrays or {}
    header["sha256"] = files._digest(header, tensors) if "nan" not in str(header) and "inf" not in str(header) else "0"
    path.write_bytes(safetensors.torch.save(tensors, {"cmlib": json.dumps(header, sort_keys=True, separators=(",", ":"))}))


FORGERIES = {
    "type": (lambda h: h["layers"]["3"].update(type="pickled"), "type 'pickled'"),
    "type missing": (lambda h: h["layers"]["3"].pop("type"), "does not say"),
    "type a list": (lambda h: h["layers"]["3"].update(type=["masked"]), "does not say"),
    "storage": (lambda h: h["layers"]["3"].update(storage="zip"), "zip"),
    "storage missing": (lambda h: h["layers"]["3"].pop("storage"), "layer 3"),
    "another storage": (lambda h: h["layers"]["3"].update(storage="bitmap"), "layer 3"),
    "format": (lambda h: h.update(format=2), "format 2"),
    "format missing": (lambda h: h.pop("format"), "format None"),
    "k negative": (lambda h: h["layers"]["3"].update(k=-3), "number -3"),
    "k zero": (lambda h: h["layers"]["3"].update(k=0), "layer 3"),
    "k huge": (lambda h: h["layers"]["3"].update(k=10**12), "layer 3"),
    "k beyond any integer": (lambda h: h["layers"]["3"].update(k=10**400), "number 1000"),
    "k a fraction": (lambda h: h["layers"]["3"].update(k=2.5), "layer 3"),
    "k a text": (lambda h: h["layers"]["3"].update(k="3"), "layer 3"),
    "k nan": (lambda h: h["layers"]["3"].update(k=float("nan")), "NaN"),
    "k infinite": (lambda h: h["layers"]["3"].update(k=float("inf")), "Infinity"),
    "shape huge": (lambda h: h["layers"]["3"].update(shape=[2**40, 2**20]), "claims the shape"),
    "shape deep": (lambda h: h["layers"]["3"].update(shape=[1] * 1000), "claims the shape"),
    "shape turned": (lambda h: h["layers"]["3"].update(shape=[48, 5]), "claims the shape"),
    "shape negative": (lambda h: h["layers"]["3"].update(shape=[-5, -48]), "number -"),
    "shape missing": (lambda h: h["layers"]["3"].pop("shape"), "claims the shape"),
    "another layer": (lambda h: h["layers"].update(head=h["layers"]["3"]), "no layer head"),
    "a layer that is not compressible": (lambda h: h["layers"].update({"1": h["layers"]["3"]}), "no layer 1"),
    "a layer less": (lambda h: h["layers"].pop("3"), "lacks 3.weight"),
    "a layer of text": (lambda h: h["layers"].update({"3": "masked"}), "does not say"),
    "layers a list": (lambda h: h.update(layers=[]), "lacks net or layers"),
    "net missing": (lambda h: h.pop("net"), "lacks net or layers"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_header_that_lies(what, small):
    edit, match = FORGERIES[what]
    forged(small, edit)
    refused(small, match)


def named(net="mlp", data="digits", seed=0):
    return {"net": net, "data": data, "seed": seed}


@pytest.mark.parametrize(
    "net",
    ["mlp", ["mlp"], {"net": "mlp"}, named("../x"), named(data=[]), named(seed=-1), named(seed=2**70), named(seed="0"), named(seed=None),
     named("lenet5"), named("cnn")],
)  # fmt: skip
def test_a_network_that_is_not_there(net, path):
    save(pruned("mlp", "digits"), path)
    forged(path, lambda h: h.update(net=net))
    with pytest.raises(FileError, match="cannot be loaded"):
        load(path)


ARRAYS = {
    "an array more": ({"3.weight|extra": torch.zeros(2)}, "extra"),
    "another state": ({"4.bias": torch.zeros(2)}, "4.bias, which the network lacks"),
    "a state of another shape": ({"3.bias": torch.zeros(6)}, r"3.bias float32 \[6\] where the network has float32 \[5\]"),
    "a state of another type": ({"3.bias": torch.zeros(5, dtype=torch.float64)}, "float64"),
    "values of another type": ({"3.weight|values": torch.zeros(72, dtype=torch.float64)}, "layer 3"),
    "too few values": ({"3.weight|values": torch.zeros(3)}, "layer 3"),
    "values in a table": ({"3.weight|values": torch.zeros(72, 1)}, "layer 3"),
    "no values": ({"3.weight|values": torch.zeros(0)}, "layer 3"),
    "gaps that lead outside": ({"3.weight|gaps": torch.full((27,), 255, dtype=torch.uint8)}, "layer 3"),
    "values far beyond the shape": ({"3.weight|values": torch.zeros(100_000)}, "400,0.. bytes for a weight of 960"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_do_not_fit(what, small):
    arrays, match = ARRAYS[what]
    forged(small, lambda h: None, arrays)
    refused(small, match)


def test_what_a_file_claims_takes_no_memory(small):
    raw, into = small.read_bytes(), tiny()
    forged(small, lambda h: h["layers"]["3"].update(shape=[2**31, 2**31]))
    bombs = [small.read_bytes()]
    bombs += [n.to_bytes(8, "little") + raw[8:] for n in (2**64 - 1, 2**63, 10**8, len(raw))]
    large = b'{"w":{"dtype":"F32","shape":[99999999999,9999999],"data_offsets":[0,4]}}'
    claims = b'{"__metadata__":{"cmlib":"{}"},"w":{"dtype":"U8","shape":[1,1000000000000],"data_offsets":[0,1000000000000]}}'
    for text in (b"[" * 200_000, b'{"a":' * 50_000, b"9" * 100_000, large, claims):
        bombs.append(len(text).to_bytes(8, "little") + text + b"0000")
    tracemalloc.start()
    for bomb in bombs:
        small.write_bytes(bomb)
        with pytest.raises(FileError):
            load(small, into=into)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_a_target_that_does_not_fit(small):
    refused(small, "no layer 3", into=nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout()))
    refused(small, "1.bias", into=nn.Sequential(nn.Conv2d(1, 3, 3), nn.Identity(), nn.Flatten(), nn.Linear(48, 5)))
    refused(small, "shape", into=nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 6)))
    refused(small, "already", into=compress(tiny(), "magnitude_pruning_han", keep=0.5))
    with pytest.raises(TypeError):
        load(small, into="resnet")


def test_what_was_loaded_can_be_trained_and_stays_pruned(path):
    save(pruned("mlp", "digits", keep=0.2), path)
    model = load(path)
    before = plan_of(load(path))
    fit(model, pictures(32, 8), epochs=2)
    after = plan_of(model)
    assert before.keys() == after.keys() and all(torch.equal(after[n].mask, before[n].mask) for n in before)
    assert not any(torch.equal(after[n].dense(), before[n].dense()) for n in before)
