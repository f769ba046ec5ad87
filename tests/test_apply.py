"""From a method to a model: what is covered, what is left alone, and masks that hold whatever is done to the copy."""

import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from cmlib.core.apply import attached, latent, plan_of, substituted, weighted, with_plain_weights
from cmlib.core.method import score
from cmlib.core.packed import Masked
from cmlib.core.planner import Planner, covered
from cmlib.core.sites import Site, inputs_at, site_of
from cmlib.core.wrapped import Sited
from cmlib.lab.train import evaluating, fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build
from cmlib.methods import catalog

METHODS = [k for k, m in catalog().items() if not m.no_plan]
SCORES = [m.key for m in catalog().values() if m.selects]
LEARNING = [m.key for m in catalog().values() if m.learns]
NORMS = [m.key for m in catalog().values() if "bn_gamma" in m.asks]


@pytest.fixture
def net(method):
    """The digits network on which a method has something to do, untrained, float64: the MLP, or the CNN for its batch norms."""
    return build("cnn" if method in NORMS else "mlp", "digits").double()


def one(method):
    """A layer of ``net`` that the method can act on alone: the last, or a hidden one where whole filters go."""
    m = catalog()[method]
    return ("conv1" if method in NORMS else "fc1") if m.chapter == "03" or m.defaults.get("unit") == "filter" else "fc2"


@pytest.fixture
def pair(digits64):
    return digits64[0][:120], digits64[1][:120]


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(after[n].numpy().tobytes() == t.numpy().tobytes() for n, t in before.items())


# where


@pytest.mark.parametrize(
    "where, layers",
    [
        (
            "*",
            "conv block1.conv1 block1.conv2 block1.shortcut.conv block2.conv1 block2.conv2 block2.shortcut.conv block3.conv1 block3.conv2 fc",
        ),
        ("Linear", "fc"),
        ("block3*", "block3.conv1 block3.conv2"),
        ("*shortcut*, fc", "block1.shortcut.conv block2.shortcut.conv fc"),
        ("fc, conv", "conv fc"),
        ("!first, !last, !*conv2", "block1.conv1 block1.shortcut.conv block2.conv1 block2.shortcut.conv block3.conv1"),
        ("Conv2d, !block*", "conv"),
        ("first, last", "conv fc"),
        ("*.conv?, !block1*, !block2.*", "block3.conv1 block3.conv2"),
    ],
)
def test_where_names_layers_by_pattern_type_and_place(where, layers):
    model = build("resnet", "mnist")
    assert list(covered(model, where)) == layers.split()
    copy = compress(model, "magnitude_pruning_han", where=where)
    assert [n for n, _, _ in attached(copy)] == layers.split() and list(covered(copy, where)) == layers.split()


@pytest.mark.parametrize(
    "where, says",
    [
        ("conv3*", "'conv3*' matches no layer"),
        ("fc11", "'fc11' matches no layer (did you mean 'fc1'?); the layers are fc1, fc2"),
        ("*, !fc9", "'fc9' matches no layer (did you mean 'fc"),
        ("linear", "'linear' matches no layer"),
        ("*, !*", "leaves no layer; the layers are fc1, fc2"),
    ],
)
def test_where_that_matches_nothing_names_what_there_is(mlp, where, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        plan(mlp, "magnitude_pruning_han", where=where)


def test_a_model_without_weights_says_so():
    with pytest.raises(ValueError, match="no convolution or dense layer"):
        plan(nn.Sequential(nn.ReLU()), "magnitude_pruning_han")


# what is wrong is said


def test_errors_name_what_mends_them(mlp):
    with pytest.raises(ValueError, match=r"no knob 'sparsity'.*its knobs are keep"):
        compress(mlp, "magnitude_pruning_han", sparsity=0.9)
    with pytest.raises(ValueError, match=r"did you mean 'damping'"):
        compress(mlp, "layerwise_obs", dampening=0.1, data=("before any", "work is done"))
    with pytest.raises(ValueError, match=r"keep=2 is not allowed: keep is a number from 0.001 to 1"):
        compress(mlp, "magnitude_pruning_han", keep=2)
    with pytest.raises(ValueError, match=r"unit='rows' is not allowed: unit is one of weight, row"):
        compress(mlp, "magnitude_pruning_han", unit="rows")
    with pytest.raises(ValueError, match=r"no method 'magnitude_prunning_han' \(did you mean 'magnitude_pruning_han'\?\)"):
        compress(mlp, "magnitude_prunning_han")
    for method, wants in [
        ("optimal_brain_damage", "hess_diag"),
        ("optimal_brain_surgeon", "hess_rows"),
        ("layerwise_obs", "acts_gram"),
        ("snip", "grad"),
    ]:
        with pytest.raises(ValueError, match=f"{method} asks for {wants}, which needs data"):
            compress(mlp, method)


def test_a_method_that_asks_for_what_nothing_provides(mlp, pair):
    @score("nobody", chapter="00")
    def hopeful(w, gradient):
        return w * gradient

    with pytest.raises(ValueError, match=r"hopeful asks for 'gradient', which nothing provides.*there are w, training, grad"):
        plan(mlp, hopeful, data=pair)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_name_their_layer(mlp, bad):
    with torch.no_grad():
        mlp.fc2.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"layer fc2 has 1 weights that are NaN or infinite"):
        plan(mlp, "magnitude_pruning_han")
    assert plan(mlp, "magnitude_pruning_han", where="fc1")


# the original


@pytest.mark.parametrize("method", METHODS)
def test_the_original_stays_bit_for_bit(net, pair, method):
    net.train()
    before, text = state(net), repr(net)
    where = "fc2" if method == "optimal_brain_surgeon" else "*"
    copy = compress(net, method, where=where, data=pair)
    fit(copy, pair, epochs=2)
    with_plain_weights(copy)
    assert unchanged(net, before) and repr(net) == text and net.training
    assert not any(m._forward_hooks for m in net.modules()) and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_original_stays_too(net, pair, method):
    """Compressing or baking what is compressed already: torch takes weights off a class that deep copies share."""
    layer = one(method)
    first = compress(net, method, where=layer, data=pair)
    before, outputs = state(first), predict(first, pair[0])
    second = compress(first, "magnitude_pruning_han", keep=0.05)
    with_plain_weights(first)
    if catalog()[method].selects or catalog()[method].kind == "quantizer":
        compress(deepcopy(first), method, where=layer, data=pair)
    else:  # it would forget what is gone
        with pytest.raises(ValueError, match=r"learns its own mask.*with_plain_weights"):
            compress(deepcopy(first), method, where=layer, data=pair)
        if layer == "fc2":
            assert plan(first, method, where="fc1", data=pair)["fc1"].kept  # elsewhere it forgets nothing
    assert unchanged(first, before) and torch.equal(predict(first, pair[0]), outputs)
    for name, m in weighted(second).items():  # where the first left fewer, those
        left = first.get_submodule(name).weight.count_nonzero()
        assert m.weight.count_nonzero() == min(left, m.weight.numel() - round(0.95 * m.weight.numel()))


@pytest.mark.parametrize("method", METHODS)
def test_the_copy_computes_with_the_plan(net, pair, method):
    where = "fc2" if method == "optimal_brain_surgeon" else "*"
    made, copy = (f(net, method, where=where, data=pair) for f in (plan, compress))
    for name, packed in made.items():
        assert torch.equal(copy.get_submodule(name).weight, packed.dense())
        assert torch.equal(plan_of(copy)[name].dense(), packed.dense()) and torch.equal(plan_of(copy)[name].mask, packed.mask)
    with inputs_at(net, {n: p.input for n, p in made.items() if isinstance(p, Sited)}):
        assert torch.equal(torch.func.functional_call(net, substituted(net, made), pair[0]), copy(pair[0]))


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_copies_and_baked_ones_give_the_same_outputs(net, pair, method):
    copy = compress(net, method, where=one(method), data=pair)
    fit(copy, pair, epochs=1)
    outputs = predict(copy, pair[0])
    again, plain = deepcopy(copy), with_plain_weights(copy.train())
    assert torch.equal(predict(again, pair[0]), outputs) and torch.equal(predict(plain, pair[0]), outputs)
    for name, module in plain.named_modules():
        if isinstance(module, Site):
            assert name.endswith(".input_site") and module.method is None and catalog()[method].acts
            continue
        assert not parametrize.is_parametrized(module) and len(module._forward_hooks) == (site_of(module) is not None)
        assert type(module) is type(net.get_submodule(name)) or type(module).__qualname__ == type(net.get_submodule(name)).__name__
    assert {n for n in plain.state_dict() if ".input_site." not in n} == set(net.state_dict())
    fit(again, pair, epochs=1, seed=5)
    assert torch.equal(predict(copy, pair[0]), outputs)


@pytest.mark.parametrize("method", LEARNING)
def test_asking_a_model_in_training_mode_disturbs_nothing(mlp, pair, method):
    copy = compress(mlp, method, data=pair)
    fit(copy, pair, epochs=1)
    wanted = {n: p.mask for n, p in plan_of(copy.eval()).items()}
    copy.train()
    memory = [dict(a.rest) for _, _, a in attached(copy)]
    assert all(torch.equal(p.mask, wanted[n]) for n, p in plan_of(copy).items())
    plan(copy, "magnitude_pruning_han")
    assert [dict(a.rest) for _, _, a in attached(copy)] == memory


# masks hold


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize(
    "rule",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_masks_survive_a_loop_of_the_users_own(net, pair, method, rule):
    where = "fc2" if method == "optimal_brain_surgeon" else "*"
    copy = compress(net, method, where=where, data=pair, keep=0.3).train()
    masks = {n: p.mask for n, p in plan_of(copy).items()}
    before = {n: copy.get_submodule(n).weight.detach().clone() for n in masks}
    stepper = rule(copy.parameters())
    for _ in range(8):
        stepper.zero_grad()
        F.cross_entropy(copy(pair[0]), pair[1]).backward()
        stepper.step()
    for name, mask in masks.items():
        weight = copy.get_submodule(name).weight
        assert (weight[~mask] == 0).all() and not torch.equal(weight[mask], before[name][mask])
        assert torch.equal(plan_of(copy)[name].mask, mask)


@pytest.mark.parametrize("unit", ["weight", "row", "block:4x4", "2:4"])
@pytest.mark.parametrize("method", [m for m in SCORES if m != "optimal_brain_surgeon"])
def test_what_was_removed_stays_removed(net, pair, method, unit):
    first = compress(net, "magnitude_pruning_han", keep=0.3)
    fit(first, pair, epochs=1)
    gone = {n: ~p.mask for n, p in plan_of(first).items()}
    for keep in (0.2, 0.9):  # less than before, and more
        second = compress(first, method, data=pair, keep=keep, unit=unit)
        fit(second, pair, epochs=1)
        covered_now = plan(first, method, data=pair, unit=unit)
        for name, packed in plan_of(second).items():
            assert not packed.mask[gone[name]].any() and (second.get_submodule(name).weight[gone[name]] == 0).all()
            if unit == "weight" and catalog()[method].defaults.get("scope") != "network" and name in covered_now:
                assert packed.kept == min(packed.mask.numel() - round((1 - keep) * packed.mask.numel()), int((~gone[name]).sum()))


def test_what_was_removed_stays_removed_under_a_repair(mlp, pair):
    first = compress(mlp, "magnitude_pruning_han", where="fc2", keep=0.3)
    second = compress(first, "optimal_brain_surgeon", where="fc2", data=pair, keep=0.5)
    assert (second.fc2.weight[~plan_of(first)["fc2"].mask] == 0).all()


def test_in_the_forward_pass_a_removed_weight_is_no_more(mlp, pair):
    copy = compress(mlp, "magnitude_pruning_han", keep=0.2).train()
    F.cross_entropy(copy(pair[0]), pair[1]).backward()
    mask = plan_of(copy)["fc1"].mask
    assert (latent(copy.fc1).grad[~mask] == 0).all() and (latent(copy.fc1).grad[mask] != 0).any()


# other peoples' networks


@pytest.mark.parametrize(
    "make, where",
    [
        ("resnet18", "layer4.0.downsample*, layer4.1.conv2"),
        ("mobilenet_v2", "features.17*, features.18*"),
        ("mobilenet_v2", "features.1.*, features.2.*"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude_pruning_han", "snip", "layerwise_obs"])
def test_torchvisions_networks(make, where, method):
    torch.manual_seed(0)
    model = getattr(torchvision.models, make)(weights=None, num_classes=10).eval()
    if method == "layerwise_obs":
        where = where.replace(", layer4.1.conv2", "").replace("features.17*, features.18*", "features.17.conv.1.0")  # H of 512 or 9, not 4,608
    data = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    copy = compress(model, method, where=where, data=data, keep=0.25)
    made = plan_of(copy)
    assert list(made) == list(covered(model, where))
    total, kept = sum(p.mask.numel() for p in made.values()), sum(p.kept for p in made.values())
    assert abs(kept - 0.25 * total) <= 0.5 * len(made)
    with torch.no_grad():
        assert torch.isfinite(copy(data[0])).all()
        assert torch.allclose(with_plain_weights(copy)(data[0]), copy(data[0]), rtol=0, atol=0)
    fit(copy, data, epochs=1, batch=4)
    for name, packed in made.items():
        assert (copy.get_submodule(name).weight[~packed.mask] == 0).all()


def test_grouped_convolutions_are_repaired_group_by_group():
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x, y = torch.randn(40, 6, 6, 6, dtype=torch.float64), torch.randint(0, 9, (40,))
    whole = plan(grouped, "layerwise_obs", data=(x, y), damping=1e-10, unit="2:4")["0"].dense()
    for g in range(3):
        alone = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), *grouped[1:]).double()
        with torch.no_grad():
            alone[0].weight.copy_(grouped[0].weight[3 * g : 3 * g + 3])
        part = plan(alone, "layerwise_obs", data=(x[:, 2 * g : 2 * g + 2], y % 3), damping=1e-10, unit="2:4")["0"].dense()
        assert torch.allclose(whole[3 * g : 3 * g + 3], part, rtol=0, atol=1e-10)


# the planner


@pytest.mark.parametrize("method", SCORES)
def test_a_moved_knob_gives_what_a_fresh_plan_gives(net, pair, method):
    where = "fc2" if method == "optimal_brain_surgeon" else "*"
    planner = Planner(net, catalog()[method], where=where, data=pair)
    moves = [
        {"keep": 0.5},
        {"keep": 0.1},
        {"keep": 0.1, "unit": "row"},
        {"keep": 0.1, "scope": "network"},
        {"threshold": 0.01},
        {"keep": 0.5},
    ]
    if "damping" in planner.method.own_knobs:
        moves += [{"keep": 0.5, "damping": 0.05}, {"keep": 0.5}]
    for move in moves:
        fresh = plan(net, method, where=where, data=pair, **move)
        for name, packed in planner(**move).items():
            assert torch.equal(packed.mask, fresh[name].mask) and torch.equal(packed.dense(), fresh[name].dense()), (method, move)


def test_storage_is_carried_along(mlp):
    assert {p.meta()["storage"] for p in plan(mlp, "magnitude_pruning_han", storage="csr").values()} == {"csr"}
    assert plan_of(compress(mlp, "magnitude_pruning_han", storage="bitmap"))["fc1"].storage == "bitmap"


def test_evaluation_works_each_attached_weight_out_once(mlp, pair):
    copy = compress(mlp, "magnitude_pruning_han")
    calls = []
    copy.fc1.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with evaluating(copy):
        for _ in range(5):
            copy(pair[0])
    assert len(calls) == 1


def test_a_user_may_mask_by_hand(mlp):
    from cmlib.core.apply import attach, detach

    mask = torch.rand(10, 32) < 0.5
    weight = mlp.fc2.weight.detach().clone()
    attach(mlp.fc2, Masked(weight, mask))
    assert torch.equal(mlp.fc2.weight, weight * mask) and list(weighted(mlp)) == ["fc1", "fc2"]
    detach(mlp.fc2)
    detach(mlp.fc2)
    assert isinstance(mlp.fc2.weight, nn.Parameter) and torch.equal(mlp.fc2.weight, weight * mask)


def test_wrong_kinds_of_things_are_named(mlp):
    images = torch.rand(5, 1, 8, 8)
    for data, said in (
        ("mnist", r"load_data\(name\).*got str 'mnist'"), ((images.numpy(), [0] * 5), r"pair of tensors.*got \(ndarray, list\)"),
        ((images, torch.zeros(3)), r"got 5 images and 3 labels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            plan(mlp, "snip", data=data)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module; got str 'mlp': load_net"):
        plan("mlp", "magnitude_pruning_han")
    with pytest.raises(TypeError, match=r"where=\['fc1'\] must be one text"):
        plan(mlp, "magnitude_pruning_han", where=["fc1"])
    with pytest.raises(ValueError, match=r"samples=0: grad is gathered on at least one image"):
        plan(mlp, "snip", data=(images, torch.zeros(5, dtype=torch.int64)), samples=0)
