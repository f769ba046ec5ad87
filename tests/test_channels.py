"""Filters that go whole: the groups of channels, the plan that follows them, and the network that is really smaller."""

import copy

import pytest
import torch
import torchvision.models as zoo_of_others
from networks import stirred
from torch import nn

from cmlib.core.apply import attached, held, plan_of, weighted, with_plain_weights
from cmlib.core.bake import bake, dead, narrowed, widths
from cmlib.core.channels import UntraceableError, example_of, groups
from cmlib.core.method import score
from cmlib.core.planner import Planner, gather
from cmlib.lab.cost import multiply_adds
from cmlib.lab.data import load_data
from cmlib.lab.files import FileError, load, save
from cmlib.lab.train import evaluate, fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net

HAN = "magnitude_pruning_han"


@pytest.fixture(scope="module")
def mnist():
    return load_data("mnist")


def filters(w):
    """L1 norm of each filter."""
    return w.abs().flatten(1).sum(1).reshape(-1, *[1] * (w.dim() - 1))


FILTERS = score("a test", chapter="-", unit="filter")(filters)


OTHERS = {
    "resnet18": zoo_of_others.resnet18,
    "mobilenet_v2": zoo_of_others.mobilenet_v2,
    "vgg16": zoo_of_others.vgg16,
    "googlenet": lambda: zoo_of_others.googlenet(aux_logits=False, init_weights=False),
    "a small densenet": lambda: zoo_of_others.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10),
}


def others(name):
    torch.manual_seed(0)
    model = stirred(OTHERS[name]().eval())
    return model, (torch.rand(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))


def same(a, b, rel=1e-5):
    return (a - b).abs().max() <= rel * b.abs().max()


def test_the_groups_of_the_residual_net_are_its_wiring(digits):
    found = {g.first: g for g in groups(build("resnet", "mnist"), torch.zeros(1, 1, 28, 28))}
    assert [g.makers for g in found.values()] == [
        ("conv",), ("block1.conv1",), ("block1.conv2", "block1.shortcut.conv"), ("block2.conv1",),
        ("block2.conv2", "block2.shortcut.conv", "block3.conv2"), ("block3.conv1",),
    ]  # fmt: skip
    assert set(found["conv"].readers) == {"block1.conv1", "block1.shortcut.conv"}
    assert set(found["block2.conv2"].norms) == {"block2.bn2", "block2.shortcut.bn", "block3.bn2"}
    assert "fc" not in found  # the output stays
    flat = {g.first: g for g in groups(build("lenet5", "mnist"), torch.zeros(1, 1, 28, 28))}
    assert torch.equal(flat["conv2"].readers["fc1"], torch.arange(800).reshape(50, 16))
    assert flat["conv1"].vectors == (("conv1.bias", 0),)


def test_channels_that_are_joined_are_found_where_they_begin():
    model, data = others("googlenet")
    branch = next(g for g in groups(model, data[0][:1]) if g.first == "inception3a.branch2.1.conv")
    assert branch.readers["inception3b.branch1.conv"].flatten().tolist() == list(range(64, 64 + 128))


@pytest.mark.parametrize("net", ["lenet300", "lenet5", "resnet"])
def test_the_kits_networks_shrink_and_say_the_same(net, mnist):
    dense = load_net(net, "mnist")
    masked = compress(dense, FILTERS, keep=0.4)
    small, x = bake(masked), mnist.test[0][:100] / 255
    assert same(small(x), masked.eval()(x))
    assert not list(attached(small)) and not list(held(small))
    wide, narrow = widths(dense), widths(small)
    for g in groups(dense, x[:1]):
        left = g.count - round(0.6 * g.count)
        out = "out_features" if "out_features" in wide[g.first] else "out_channels"
        assert {narrow[n][out] for n in g.makers} == {left}
    assert multiply_adds(small, x[:1]) < 0.45 * multiply_adds(dense, x[:1])


@pytest.mark.parametrize("name", OTHERS)
def test_torchvisions_networks_shrink_and_say_the_same(name, tmp_path):
    model, data = others(name)
    before = {n: t.clone() for n, t in model.state_dict().items()} if name != "vgg16" else {}
    masked = compress(model, FILTERS, keep=0.5, data=data)
    small = bake(masked, data)
    with torch.no_grad():
        assert same(small(data[0]), masked(data[0]))
        assert not same(small(data[0]), model(data[0]), 1e-3)
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    if name != "vgg16":
        save(small, tmp_path / "small")
        back = load(tmp_path / "small", into=others(name)[0])
        with torch.no_grad():
            assert torch.equal(back(data[0]), small(data[0]))


def test_channels_are_followed_where_no_gradients_are_wanted_and_never_silently_not():
    masked = compress(load_net("resnet", "mnist"), FILTERS, keep=0.5)
    with torch.no_grad():
        assert sum(p.numel() for p in bake(masked).parameters()) == 37_186
    with torch.inference_mode(), pytest.raises(UntraceableError, match=r"RuntimeError: Inference tensors"):
        bake(masked)


def test_a_filter_takes_bias_and_batch_norm_with_it(digits):
    dense = stirred(load_net("cnn", "digits"))
    dense.conv1.bias.data.fill_(3.0)
    masked = compress(dense, FILTERS, where="conv1", keep=0.5)
    gone = ~plan_of(masked)["conv1"].rows
    for v in (masked.conv1.bias, masked.bn1.weight, masked.bn1.bias):
        assert (v[gone] == 0).all() and (v[~gone] != 0).all()
    assert dense.bn1.bias.count_nonzero() == 8
    rows = compress(dense, HAN, where="conv1", keep=0.5, unit="row")
    assert (rows.bn1.bias != 0).all()  # a row is of the weight alone
    fit(masked, digits, epochs=1, lr=0.05)
    assert (masked.bn1.bias[gone] == 0).all() and (masked.conv1.weight[gone] == 0).all()
    assert same(predict(bake(masked), digits.test[0]), predict(masked, digits.test[0]))


def test_tied_layers_lose_the_same_filters_by_their_mean_score():
    net = load_net("resnet", "mnist")
    found = plan(net, FILTERS, where="block1.conv2", keep=0.5)
    assert torch.equal(found["block1.conv2"].rows, found["block1.shortcut.conv"].rows)
    alone = filters(net.block1.conv2.weight.detach()).flatten()
    assert set(found["block1.conv2"].rows.nonzero().flatten().tolist()) == set(alone.topk(16).indices.tolist())
    both = plan(net, FILTERS, keep=0.5)
    mean = (alone + filters(net.block1.shortcut.conv.weight.detach()).flatten()) / 2
    assert set(both["block1.conv2"].rows.nonzero().flatten().tolist()) == set(mean.topk(16).indices.tolist())
    assert both["fc"].mask.all()


def test_one_filter_stays_and_says_so():
    with pytest.warns(UserWarning, match=r"conv1 would keep none of its 20 channels; its best one stays"):
        found = plan(load_net("lenet5", "mnist"), FILTERS, where="conv*", keep=0.001)
    best = filters(load_net("lenet5", "mnist").conv1.weight.detach()).flatten().argmax()
    assert found["conv1"].rows.nonzero().flatten().tolist() == [best]


def test_the_output_cannot_go_and_what_has_no_image_asks_for_one():
    with pytest.raises(ValueError, match=r"the channels of fc2 cannot go: they are the network's output; unit='row'"):
        plan(load_net("mlp", "digits"), FILTERS, where="fc2")
    with pytest.raises(UntraceableError, match=r"pass data=\(images, labels\)"):
        example_of(nn.Linear(3, 2))


class Curious(nn.Module):
    """A forward pass that no graph can follow: it looks into its numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.from_numpy(self.a(x).relu().detach().numpy()))


class Offset(nn.Module):
    """A channel that is zero and still says something: cos(0) = 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).cos())


def test_a_network_that_cannot_be_followed_is_told():
    data = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot go|cannot follow"):
        compress(Curious(), FILTERS, data=data, keep=0.5)
    assert compress(Curious(), HAN, unit="row", keep=0.5).a.weight.count_nonzero() == 12
    masked = compress(Offset(), FILTERS, data=data, keep=0.5)
    with pytest.raises(UntraceableError, match=r"an activation of zero is not zero here"):
        bake(masked, data)


def test_files_carry_masks_of_filters_and_narrow_networks(tmp_path, mnist):
    masked, x = compress(load_net("resnet", "mnist"), FILTERS, keep=0.5), mnist.test[0][:50] / 255
    save(masked, tmp_path / "masked")
    back = load(tmp_path / "masked")
    assert torch.equal(back(x), masked.eval()(x)) and len(list(held(back))) == len(list(held(masked)))
    assert torch.equal(bake(back)(x), bake(masked)(x))
    small = bake(masked)
    held_bytes = save(small, tmp_path / "small")
    assert held_bytes < 0.3 * save(load_net("resnet", "mnist"), tmp_path / "dense")
    for again in (load(tmp_path / "small"), load(tmp_path / "small", into=build("resnet", "mnist"))):
        assert torch.equal(again(x), small(x)) and again.widths == small.widths
        twice = bake(compress(again, FILTERS, keep=0.5, data=mnist), mnist)
        assert twice.block3.conv1.out_channels == 16
    with pytest.raises(FileError, match=r"channels removed that the network does not have"):
        load(tmp_path / "small", into=build("lenet5", "mnist"))


def test_narrowing_refuses_nothing_it_was_not_told(tmp_path):
    net = build("lenet5", "mnist")
    narrow = narrowed(copy.deepcopy(net), {"conv1": {**widths(net)["conv1"], "out_channels": 7}})
    assert narrow.conv1.weight.shape == (7, 1, 5, 5) and narrow.conv1.bias.shape == (7,) and net.conv1.weight.shape == (20, 1, 5, 5)


def test_a_dead_channel_is_zero_in_every_vector(digits):
    net = with_plain_weights(load_net("cnn", "digits"))
    group = groups(net, torch.zeros(1, 1, 8, 8))[0]
    net.conv1.weight.data[2] = 0
    assert dead(net, group) == []
    net.conv1.bias.data[2], net.bn1.weight.data[2], net.bn1.bias.data[2] = 0, 0, 0
    assert dead(net, group) == [2]


# evidence of channels


def test_zeros_are_counted_behind_the_relu(mnist):
    net, data = load_net("resnet", "mnist"), (mnist.train[0][:70], mnist.train[1][:70])
    found = gather(net, weighted(net), "zeros", data)
    with torch.no_grad():
        x = net.relu(net.bn(net.conv(data[0] / 255)))
        y = torch.relu(net.block1.bn1(net.block1.conv1(x)))
        z = net.block1(x)
    assert torch.equal(found["conv"], (x == 0).double().mean((0, 2, 3)))
    assert torch.equal(found["block1.conv1"], (y == 0).double().mean((0, 2, 3)))
    assert torch.equal(found["block1.shortcut.conv"], (z == 0).double().mean((0, 2, 3)))
    assert "fc" not in found


def test_flow_is_the_gradient_of_a_gate(digits):
    net, (x, y) = load_net("cnn", "digits").double(), (digits.train[0][:50] / 255.0, digits.train[1][:50])
    found = gather(net, weighted(net), "flow", (x.double(), y))
    gates = torch.ones(50, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    z = net.relu1(net.bn1(net.conv1(x.double())))
    out = net.fc(net.flatten(net.pool(net.relu2(net.bn2(net.conv2(z * gates))))))
    slopes = torch.autograd.grad(nn.functional.cross_entropy(out, y, reduction="sum"), gates)[0]
    assert torch.allclose(found["conv1"], slopes.flatten(1).abs().mean(0) / z[0, 0].numel(), rtol=1e-9)


def test_what_the_next_layer_reads_makes_its_output(digits, mnist):
    for net, data, layer, after in ((load_net("cnn", "digits"), digits, "conv1", "conv2"), (load_net("lenet5", "mnist"), mnist, "conv2", "fc1")):
        acts, w = (gather(net, weighted(net), n, data, samples=64)[layer] for n in ("next_acts_in", "next_w"))
        reader, seen = net.get_submodule(after), []
        handle = reader.register_forward_hook(lambda m, i, o, seen=seen: seen.append((o - m.bias.reshape(-1, *[1] * (o.dim() - 2))).detach()))
        from cmlib.core.inputs import as_input, sample

        net(as_input(sample(data, 64)[0], net))
        handle.remove()
        outputs = torch.einsum("sck,ock->so", acts, w)
        there = seen[0].movedim(1, -1).reshape(-1, len(reader.weight))
        near = torch.cdist(outputs.double(), there.double()).min(1).values
        assert near.max() < 1e-3 * there.abs().max()


def test_a_planner_leaves_out_layers_without_what_is_asked(mnist):
    def alive(zeros):
        """Filters by how often they fire."""
        return 1 - zeros

    method = score("a test", chapter="-", unit="filter")(alive)
    planner = Planner(load_net("lenet5", "mnist"), method, data=mnist)
    assert list(planner.layers) == ["fc1"]  # its convolutions have no ReLU
    with pytest.raises(ValueError, match=r"asks for zeros.*behind its ReLU.*none of conv1"):
        Planner(load_net("lenet5", "mnist"), method, data=mnist, where="conv1")
    assert evaluate(compress(load_net("lenet5", "mnist"), method, data=mnist, keep=0.9), mnist) > 0.9


# pruned again and again


GAMMA = "network_slimming"


def chain(*, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return made, (torch.rand(8, 3, 8, 8), torch.randint(0, 4, (8,)))


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("method", [FILTERS, GAMMA, "magnitude_pruning_han"])
def test_filters_pruned_in_two_steps_are_those_of_one(method, scope):
    model, data = chain()
    stirred(model)
    for keep in (0.75, 0.5, 0.25):
        given = {"data": data, "unit": "filter", "scope": scope, "keep": keep}
        once = plan_of(compress(model, method, **given))
        twice = plan_of(compress(compress(model, method, **{**given, "keep": 0.9}), method, **given))
        assert all(torch.equal(p.mask, twice[n].mask) and p.vectors == twice[n].vectors for n, p in once.items())


def test_weights_pruned_after_filters_leave_the_filters_silent(tmp_path):
    model, data = chain()
    first = compress(stirred(model), FILTERS, data=data, keep=0.5)
    second = compress(first, HAN, keep=0.3)
    save(second, tmp_path / "both")
    back = load(tmp_path / "both", into=chain()[0].eval())
    assert torch.equal(back(data[0]), second.eval()(data[0]))
    assert widths(bake(second, data))["0"]["out_channels"] == 4


def test_a_rebuilt_reader_keeps_its_own_mask():
    model, data = chain()
    masked = compress(stirred(model), HAN, where="3", keep=0.1)
    before = plan_of(masked)["3"].mask
    for method in ("lasso_channel_pruning", "thinet"):
        after = plan_of(compress(masked, method, where="0", keep=0.5, data=data))["3"].mask
        assert torch.equal(after, before)


def test_a_joint_repair_reaches_layers_that_are_tied_to_a_covered_one():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x):
            y = self.a(x)
            return self.c((y + self.b(y).relu()).mean((2, 3)))

    found = plan(Block(), "optimal_brain_surgeon", where="a", unit="filter", keep=0.5, data=(torch.rand(9, 1, 6, 6), torch.randint(0, 3, (9,))))
    assert torch.equal(found["a"].rows, found["b"].rows) and int(found["a"].rows.sum()) == 2


# what cannot lose a channel


def test_what_goes_on_outside_torch_is_said_to_be_out_of_sight():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.from_numpy(self.a(x).detach().numpy()))

    for where in ("*", "a"):
        with pytest.raises(ValueError, match=r"what a gives cannot be followed: .* \(numpy, detach\)"):
            compress(Through(), FILTERS, where=where, keep=0.5, data=(torch.rand(4, 6), torch.arange(4) % 3))


@pytest.mark.parametrize(
    ("between", "said"),
    [(nn.GroupNorm(2, 8), r"0 cannot go: 1 \(GroupNorm\) is on their way"), (nn.PReLU(8), r"0 cannot go: 1 \(PReLU\)"),
     (nn.Conv2d(8, 8, 3, groups=4), r"0 cannot go: 1 is a grouped convolution")],
)  # fmt: skip
def test_what_stands_in_the_way_is_told(between, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), between, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    data = torch.rand(5, 1, 12, 12), torch.randint(0, 3, (5,))
    model(data[0])
    with pytest.warns(UserWarning, match=said):
        masked = compress(model, FILTERS, data=data, keep=0.5)
    assert (masked[0].weight.flatten(1).any(1)).all() and int(plan_of(masked)["2"].rows.sum()) == 3
    assert same(bake(masked, data)(data[0]), masked.eval()(data[0]))
    with pytest.raises(ValueError, match=said):
        compress(model, FILTERS, where="0", data=data)


def test_taylor_follows_the_map_to_its_activation_whatever_that_is():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(nn.functional.gelu(self.bn(self.a(x))).mean((2, 3)))

    model, data = stirred(Smooth()), (torch.rand(7, 1, 6, 6), torch.randint(0, 3, (7,)))
    z = nn.functional.gelu(model.bn(model.a(data[0]))).detach().requires_grad_()
    slope = torch.autograd.grad(nn.functional.cross_entropy(model.b(z.mean((2, 3))), data[1], reduction="sum"), z)[0]
    expected = (z * slope).mean((2, 3)).abs().mean(0)
    assert torch.allclose(gather(model, weighted(model), "flow", data)["a"], expected.detach(), rtol=1e-4)


def test_images_that_the_network_refuses_are_told_with_their_shape():
    with pytest.raises(UntraceableError, match=r"refuses an image of shape \(1, 28, 28\).*whose images it takes"):
        plan(others("resnet18")[0], FILTERS, data=(torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)))
