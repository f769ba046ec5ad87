"""What ``measure`` says of codes: their bytes by what they are for, bits of rounded inputs, and why time and memory stay."""

import pytest

import cmlib
from cmlib.core.apply import plan_of
from cmlib.lab.files import save, sizes
from cmlib.lab.measure import codes_in, costs, input_bits
from cmlib.lab.zoo import load_net

HAN = "magnitude_pruning_han"


def quantized(key, net="mlp", keep=None, **knobs):
    model = load_net(net, "digits")
    model = model if keep is None else cmlib.compress(model, HAN, keep=keep)
    return cmlib.compress(model, key, data=cmlib.load_data("digits"), **knobs)


MODELS = {
    "ternary": lambda: quantized("ternary_weight_networks", per="filter"),
    "pruned, then codes": lambda: quantized("vq_gong", keep=0.2, k=8),
    "codes added up": lambda: quantized("vq_gong", scheme="residual", k=8),
    "codes and floats": lambda: quantized("inq", portion=0.5),
    "rounded inputs": lambda: quantized("dorefa_net", "cnn", bits=3, a_bits=2),
    "entropy-coded": lambda: cmlib.coded(quantized("vq_gong", keep=0.2, k=8)),
    "pruned": lambda: cmlib.compress(load_net("mlp", "digits"), HAN, keep=0.2, storage="relative"),
}


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_the_bytes_of_the_arrays(name, tmp_path):
    model = MODELS[name]()
    save(model, tmp_path / "model.cml")
    held, found = sizes(tmp_path / "model.cml"), {n: costs(p) for n, p in plan_of(model).items()}
    assert {n: sum(c.values()) for n, c in found.items()} == held["layers"]
    assert sum(c["places"] for c in found.values()) == held["indices"] == cmlib.measure(model).index_bytes
    for layer, packed in plan_of(model).items():
        arrays, tables = packed.arrays(), sum(c.params.nbytes for c in codes_in(packed))
        assert found[layer]["tables"] == tables and (tables > 0) == (name != "pruned")
        assert found[layer]["inputs"] == sum(a.nbytes for n, a in arrays.items() if n.startswith("input."))


def test_layers_of_codes():
    row = cmlib.measure(MODELS["pruned, then codes"]())
    dense = {"fc1": 2048, "fc2": 320}
    assert {layer.name: (layer.weights, layer.kept, layer.levels) for layer in row.layers} == {n: (k, round(0.2 * k), 8) for n, k in dense.items()}
    assert row.parameters == sum(round(0.2 * k) for k in dense.values()) + 42
    assert row.weight_bits == 8 * sum(layer.bytes for layer in row.layers) / 2368
    assert all("3-bit codes + " in layer.format for layer in row.layers)


def test_activation_bits_are_those_of_the_rounded_inputs():
    row = cmlib.measure(MODELS["rounded inputs"]())
    assert row.activation_bits == 2 and [layer.input_bits for layer in row.layers] == [None, 2, 2]
    assert any(s.startswith("Rounded inputs: conv2 2 bits, fc 2 bits; as they were: conv1.") for s in row.explain())
    plain = cmlib.measure(MODELS["ternary"]())
    assert plain.activation_bits == 32 and not plain.rounds_inputs and not any("Rounded inputs" in s for s in plain.explain())
    assert input_bits(plan_of(MODELS["pruned"]())["fc1"]) is None


@pytest.fixture(scope="module")
def digits_images():
    return tuple(t[:100] for t in cmlib.load_data("digits").validation)


def test_why_codes_are_not_faster(digits_images):
    dense = load_net("mlp", "digits")
    said = " ".join(cmlib.measure(MODELS["ternary"](), dense, digits_images, rounds=3).explain())
    assert "Multiply-adds stay at 2,368: each code is unpacked to a float32 number" in said and "integer_network()" in said
    assert "zeros" not in said and "sparse" not in said.lower() and "The same dense kernels run" in said
    both = " ".join(cmlib.measure(MODELS["pruned, then codes"](), dense, digits_images, rounds=3).explain())
    assert "the zeros sit in dense matrices" in both and "each code is unpacked" in both and "bits of index" in both
    pruned = " ".join(cmlib.measure(MODELS["pruned"](), dense, digits_images, rounds=3).explain())
    assert "each code" not in pruned and "integer_network" not in pruned
    rounding = cmlib.measure(MODELS["rounded inputs"](), load_net("cnn", "digits"), digits_images, rounds=3).explain()
    assert not any("The same dense kernels run" in s for s in rounding)  # rounding is work of its own


def test_levels_that_cost_too_much_are_named():
    dense = load_net("mlp", "digits")
    row = cmlib.measure(quantized("vq_gong", k=256), dense)
    (worse,) = [s for s in row.explain() if "as they were." in s]
    fc2 = row.layers[1]
    assert (
        worse == f"fc2: its codes and levels take {fc2.bytes:,} bytes, more than the 1,280 of its weights as they were." and fc2.bytes == 320 + 1024
    )
    tables = sum(layer.table_bytes for layer in row.layers)
    assert tables == 2 * 1024 and f"What the codes stand for (scales, codebooks) takes {tables:,} bytes" in " ".join(row.explain())
    few = " ".join(cmlib.measure(quantized("ternary_weight_networks"), dense).explain())
    assert "What the codes stand for" not in few and "more than the" not in few
