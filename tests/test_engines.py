"""ONNX files answer as the network does, int8 files hold int8, and what cannot be written or read is named."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from cmlib.core.inputs import as_input, sample
from cmlib.lab.data import load_data
from cmlib.lab.engines import Engine, EngineError, to_int8, to_onnx
from cmlib.lab.measure import latency
from cmlib.lab.train import evaluate, predict
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import load_net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def files(folder, digits):
    """The digits' CNN as float32, as int8, and as int8 with a scale a filter."""
    made = {name: folder / f"{name}.onnx" for name in ("float", "tensor", "filter")}
    to_onnx(load_net("cnn", "digits"), made["float"], as_input(digits.train[0][:1]))
    for per in ("tensor", "filter"):
        to_int8(made["float"], made[per], digits, per=per)
    return made


@pytest.fixture(scope="module")
def lenet5(folder):
    """LeNet-5 as float32 and as int8, with the bytes that the functions said."""
    data = load_data("mnist")
    paths = folder / "lenet5.onnx", folder / "lenet5-int8.onnx"
    said = to_onnx(load_net("lenet5", "mnist"), paths[0], as_input(data.train[0][:1])), to_int8(*paths, data)
    return *paths, *said


def test_the_engine_answers_as_the_network_at_any_batch(files, digits):
    net, engine = load_net("cnn", "digits"), Engine(files["float"])
    for count in (1, 3, 64):
        x = as_input(digits.validation[0][:count])
        with torch.no_grad():
            assert torch.allclose(engine(x), net(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(predict(engine, digits.validation[0]), predict(net, digits.validation[0]), rtol=1e-5, atol=1e-5)
    assert evaluate(engine, digits) == evaluate(net, digits)


def test_an_engine_is_timed_beside_a_network(files, digits):
    models = {"torch": load_net("cnn", "digits"), "float": Engine(files["float"]), "int8": Engine(files["tensor"])}
    times = latency(models, as_input(digits.validation[0][:8]), rounds=5, threads=1)
    assert list(times.index) == list(models) and (times.ms > 0).all()


def test_a_compressed_network_is_written_as_it_computes(folder, digits):
    small = compress(load_net("mlp", "digits"), "magnitude_pruning_han", keep=0.2)
    assert to_onnx(small, folder / "pruned.onnx", as_input(digits.train[0][:5])) == (folder / "pruned.onnx").stat().st_size
    x = digits.validation[0][:20]
    assert torch.allclose(predict(Engine(folder / "pruned.onnx"), x), predict(small, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_int8_files_hold_int8_weights_with_the_scales_asked_for(files, per):
    model = onnx.load(files[per])
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in arrays and arrays[n.input[0]].dtype == np.int8]
    shapes = sorted(arrays[n.input[0]].shape for n in weights)
    assert len(weights) == 3 and shapes[0][0] == 8 and {len(s) for s in shapes} == {2, 4}
    for n in weights:
        scale = arrays[n.input[1]]
        assert scale.size == (arrays[n.input[0]].shape[0] if per == "filter" and scale.ndim else 1)
    assert any(arrays[n.input[1]].ndim == 1 for n in weights) == (per == "filter")
    zeros = [arrays[n.input[2]].dtype for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert set(zeros) == {np.dtype(np.uint8)}


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_int8_is_close_and_not_the_same(files, digits, per):
    x = digits.validation[0]
    dense, low = predict(Engine(files["float"]), x), predict(Engine(files[per]), x)
    gap = (dense - low).abs().max() / (dense.max() - dense.min())
    assert 1e-4 < gap < 0.05  # where sums of two products saturate at 16 bits: 0.07, and 0.21 with a scale a filter
    assert abs(evaluate(Engine(files[per]), digits) - evaluate(Engine(files["float"]), digits)) <= 0.01


def test_lenet5_in_int8_is_small_and_as_accurate(lenet5):
    path, low, said, said_low = lenet5
    assert (path.stat().st_size, low.stat().st_size) == (said, said_low) and said / said_low >= 3.8
    data = load_data("mnist")
    assert abs(evaluate(Engine(low), data) - evaluate(Engine(path), data)) <= 0.001


def test_ranges_come_from_training_images_only(folder, files, digits):
    blind = replace(digits, validation=(digits.validation[0] * 0, digits.validation[1]), test=(digits.test[0] * 0, digits.test[1]))
    to_int8(files["float"], folder / "blind.onnx", blind)
    assert (folder / "blind.onnx").read_bytes() == files["tensor"].read_bytes()
    to_int8(files["float"], folder / "pair.onnx", sample(digits, 40), samples=40)
    assert (folder / "pair.onnx").read_bytes() != files["tensor"].read_bytes()


def test_files_say_nothing_of_the_machine_that_wrote_them(files):
    for path in files.values():
        raw = path.read_bytes()
        assert b"site-packages" not in raw and b'File "' not in raw and str(path.parent).encode() not in raw


def test_nothing_is_said_on_the_way(folder, digits, capfd):
    to_onnx(load_net("linear", "digits"), folder / "linear.onnx", as_input(digits.train[0][:2]))
    to_int8(folder / "linear.onnx", folder / "linear-int8.onnx", digits)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


class Eigenvalues(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.transpose(-1, -2)).flatten(1)


def test_the_layer_that_onnx_cannot_express_is_named(folder, capfd):
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(1, 2, 3))
    net.add_module("spectrum", Eigenvalues())
    with pytest.raises(
        EngineError, match=r"layer spectrum \(Eigenvalues\) cannot be written as ONNX: DispatchError: No ONNX function found for .*eigh"
    ):
        to_onnx(net.eval(), folder / "no.onnx", torch.rand(1, 1, 8, 8))
    assert not list(folder.glob("*no.onnx*")) and capfd.readouterr().err == ""


def test_a_path_that_depends_on_the_numbers_is_said_to_be_the_forward_pass(folder, capfd):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else F.relu(x)

    with pytest.raises(EngineError, match="the forward pass of Branch cannot be written as ONNX"):
        to_onnx(Branch().eval(), folder / "no.onnx", torch.rand(1, 4))
    assert capfd.readouterr().err == ""


def test_bad_input_is_named(folder, files, digits):
    net = load_net("cnn", "digits")
    with pytest.raises(EngineError, match=r"the network refuses an example of shape \(1, 3, 8, 8\): RuntimeError"):
        to_onnx(net, folder / "no.onnx", torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="per='channel' is not allowed: one of tensor, filter"):
        to_int8(files["float"], folder / "no.onnx", digits, per="channel")
    with pytest.raises(ValueError, match="samples=0"):
        to_int8(files["float"], folder / "no.onnx", digits, samples=0)
    with pytest.raises(ValueError, match="and some; got 0 images"):
        to_int8(files["float"], folder / "no.onnx", (digits.train[0][:0], digits.train[1][:0]))
    with pytest.raises(EngineError, match=r"float.onnx cannot be quantized: .*invalid dimensions"):
        to_int8(files["float"], folder / "no.onnx", (torch.rand(4, 3, 8, 8), torch.zeros(4)))
    assert not list(folder.glob("*no.onnx*"))


def test_files_that_are_missing_or_cut_are_refused(folder, files, digits):
    cut = folder / "cut.onnx"
    cut.write_bytes(files["float"].read_bytes()[:4000])
    for path in (folder / "missing.onnx", cut):
        with pytest.raises(EngineError, match=f"{path.name} cannot be run by ONNX Runtime"):
            Engine(path)
        with pytest.raises(EngineError, match=f"{path.name} cannot be quantized"):
            to_int8(path, folder / "no.onnx", digits)
    assert not list(folder.glob("*no.onnx*"))


def test_a_file_is_whole_or_as_it_was(folder, files, digits, monkeypatch):
    target = folder / "kept.onnx"
    target.write_bytes(b"before")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(EngineError, match=r"kept.onnx cannot be written: no room"):
        to_int8(files["float"], target, digits)
    assert target.read_bytes() == b"before" and not list(folder.glob(".kept*"))
    monkeypatch.undo()
    with pytest.raises(EngineError, match="cannot be written"):
        to_int8(files["float"], folder / "no such folder" / "x.onnx", digits)


def test_threads_are_fixed(files):
    options = Engine(files["float"], threads=2).session.get_session_options()
    assert options.intra_op_num_threads == 2 and options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert Engine(files["float"]).session.get_session_options().intra_op_num_threads == 1
