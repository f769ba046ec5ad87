"""Accuracy while the hand moves: intervals that hold, figures that are those of ``evaluate``, a model that no question changes."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from cmlib.core.inputs import as_input, stratified
from cmlib.core.packed import Masked
from cmlib.core.rounding import Affine, Steps
from cmlib.core.sites import site_of
from cmlib.core.wrapped import Sited
from cmlib.lab.data import load_data
from cmlib.lab.train import evaluate
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.view import live as module
from cmlib.view.live import FIRST, HALF_WIDTH, Live, interval, middle_and_half

HAN = "magnitude_pruning_han"


@pytest.fixture(scope="module")
def lenet():
    return load_net("lenet300", "mnist")


@pytest.fixture(scope="module")
def mnist():
    return load_data("mnist")


@pytest.fixture(scope="module")
def lenet_live(lenet, mnist):
    return Live(lenet, mnist)


@pytest.fixture(scope="module")
def cnn_live():
    return Live(load_net("cnn", "digits"), load_data("digits"))


def weights_of(model, keep, where="*"):
    with torch.no_grad():
        return {name: packed.dense() for name, packed in plan(model, HAN, where=where, keep=keep).items()}


# The interval


def first_shown(labels, shares, draws=2_000, batch=125):
    """What ``Live.estimates`` would first show (middle, half-width, images done), where class c has ``shares[c]`` right, its images dealt out anew
    each time; and the exact figure."""
    totals, labels = torch.bincount(labels), labels[stratified(labels, len(labels))]
    right = [round(share * int(n)) for share, n in zip(shares, totals)]
    hits = torch.zeros(draws, len(labels), dtype=torch.bool)
    for c, count in enumerate(right):
        at = (labels == c).nonzero().flatten()
        hits[:, at] = torch.rand(draws, len(at)).argsort(1) < count
    kinds = nn.functional.one_hot(labels).float()
    correct = torch.stack([h.float() @ k for h, k in zip(hits.split(batch, 1), kinds.split(batch))], 1).cumsum(1).long()
    done = torch.stack([k.sum(0) for k in kinds.split(batch)]).cumsum(0).long()
    middle, half = middle_and_half(correct, done, totals)
    images = done.sum(1).expand_as(half)
    first = ((images >= FIRST) & (half <= HALF_WIDTH) | (images == len(labels))).int().argmax(1, keepdim=True)
    shown = torch.stack([t.gather(1, first)[:, 0] for t in (middle, half, images.double())], 1).tolist()
    alone = interval(correct[0, first[0, 0]], done[first[0, 0]], totals)
    assert shown[0] == pytest.approx([alone.accuracy, alone.half, alone.done])  # many at once are as each alone
    return shown, sum(right) / len(labels)


PROFILES = {
    "good": [0.99] * 10, "better": [0.998] * 10, "fair": [0.95] * 10, "uneven": [1.0, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7],
    "half": [0.5] * 10, "forgets two": [0.98] * 8 + [0.0, 0.02], "one answer": [1.0] + [0.0] * 9,
}  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
def test_intervals_cover_the_exact_figure(mnist, profile):
    shown, exact = first_shown(mnist.validation[1], PROFILES[profile])
    assert sum(abs(middle - exact) <= half + 1e-12 for middle, half, _ in shown) >= 0.94 * len(shown)
    assert all(half <= HALF_WIDTH and done >= FIRST for _, half, done in shown)
    assert all(done < len(mnist.validation[1]) for *_, done in shown)  # something is shown before the end


@pytest.mark.parametrize("profile", ["good", "fair", "uneven", "forgets two"])
def test_intervals_cover_in_a_small_set_of_unequal_classes(profile):
    labels = torch.arange(10).repeat_interleave(torch.tensor([15, 25, 50, 60, 80, 100, 120, 150, 190, 210]))
    shown, exact = first_shown(labels, PROFILES[profile])
    assert sum(abs(middle - exact) <= half + 1e-12 for middle, half, _ in shown) >= 0.94 * len(shown)


def test_all_images_done_is_the_figure_itself():
    correct, total = torch.tensor([240, 193]), torch.tensor([250, 250])
    found = interval(correct, total, total)
    assert (found.accuracy, found.half, found.exact, found.done, found.total) == (433 / 500, 0.0, True, 500, 500)


def test_an_interval_by_hand():
    found = interval(torch.tensor([9, 6]), torch.tensor([10, 20]), torch.tensor([100, 300]))
    assert found.accuracy == pytest.approx(0.25 * 0.9 + 0.75 * 0.3)
    first = 10 / 12 * 2 / 12 / 10 * 90 / 99
    second = 7 / 22 * 15 / 22 / 20 * 280 / 299
    assert found.half == pytest.approx(1.959964 * (0.25**2 * first + 0.75**2 * second) ** 0.5)


def test_an_interval_narrows_with_the_images_and_stays_open_at_the_ends():
    total = torch.full((10,), 500)
    halves = [interval(torch.full((10,), 9 * n // 10), torch.full((10,), n), total).half for n in (20, 50, 100, 250, 490)]
    assert halves == sorted(halves, reverse=True) and halves[-1] < 0.002
    for correct in (0, 25):  # all or none right so far does not mean all or none right
        assert interval(torch.full((10,), correct), torch.full((10,), 25), total).half > 0


def test_a_class_without_images_is_left_out_and_one_not_seen_yet_shows_nothing():
    found = interval(torch.tensor([20, 0, 30]), torch.tensor([25, 0, 40]), torch.tensor([50, 0, 80]))
    assert found == interval(torch.tensor([20, 30]), torch.tensor([25, 40]), torch.tensor([50, 80]))
    assert not interval(torch.tensor([300, 0]), torch.tensor([300, 0]), torch.tensor([900, 2])).half <= HALF_WIDTH


# The figures


@pytest.mark.parametrize(("keep", "where"), [(0.05, "*"), (0.2, "fc2"), (0.1, "*, !first"), (0.02, "fc3"), (1.0, "*")])
def test_accuracy_is_that_of_the_compressed_network(lenet, mnist, lenet_live, keep, where):
    assert lenet_live.accuracy(weights_of(lenet, keep, where)) == evaluate(compress(lenet, HAN, where=where, keep=keep), mnist)


@pytest.mark.parametrize(("keep", "where"), [(0.3, "*"), (0.3, "conv2"), (0.5, "fc"), (0.2, "Conv2d")])
def test_accuracy_with_batch_norm_and_convolutions(digits, cnn_live, keep, where):
    model = load_net("cnn", "digits")
    assert cnn_live.accuracy(weights_of(model, keep, where)) == evaluate(compress(model, HAN, where=where, keep=keep), digits)


def test_a_compressed_network_is_taken_as_it_computes(digits):
    model = compress(load_net("mlp", "digits"), HAN, keep=0.2)
    assert Live(model, digits).accuracy() == evaluate(model, digits)


def test_the_last_estimate_is_exact_and_answers_come_whole(lenet, lenet_live):
    weights = weights_of(lenet, 0.04)
    found = list(lenet_live.estimates(weights))
    last, answers = found[-1]
    assert (last.half, last.done, last.total) == (0.0, 5_000, 5_000)
    assert last.accuracy == pytest.approx(lenet_live.accuracy(weights), abs=1e-12)
    assert torch.equal(answers, lenet_live.answers(weights))
    assert sum(e is not None and not e.exact for e, _ in found) > 0


def test_estimates_are_shown_once_narrow_enough(lenet, lenet_live):
    for keep in (0.5, 0.06, 0.03, 0.001):
        shown = [e for e, _ in lenet_live.estimates(weights_of(lenet, keep)) if e is not None]
        assert all(e.half <= HALF_WIDTH and e.done >= FIRST for e in shown)
        assert all(abs(e.accuracy - shown[-1].accuracy) <= 2 * e.half for e in shown)
    assert next(e for e, _ in lenet_live.estimates({}) if e is not None).done < 500  # a good network is known early


def test_by_class_agrees_with_counting(lenet_live):
    found = lenet_live.by_class(lenet_live.dense)
    for c in range(10):
        of_class = lenet_live.labels == c
        assert found[c] == pytest.approx((lenet_live.dense[of_class] == c).float().mean().item())
    assert (found * torch.bincount(lenet_live.labels)).sum().item() / 5_000 == pytest.approx(lenet_live.accuracy())


def test_every_prefix_of_the_order_is_stratified(lenet_live):
    whole = torch.bincount(lenet_live.labels).double() / 5_000
    for done in (125, 250, 1_000, 3_333):
        counts = torch.bincount(lenet_live.labels[:done], minlength=10)
        assert (counts - done * whole).abs().max() <= 1.0001
    assert torch.equal(lenet_live.order.sort().values, torch.arange(5_000))


# What is kept, and what is left alone


@pytest.mark.parametrize(("net", "where", "stage"), [("lenet300", "fc3", 5), ("lenet300", "fc2", 3), ("cnn", "conv2", 3), ("cnn", "fc", 8)])
def test_what_lies_before_the_first_changed_layer_is_kept(lenet, lenet_live, cnn_live, monkeypatch, net, where, stage):
    live, model = (lenet_live, lenet) if net == "lenet300" else (cnn_live, load_net("cnn", "digits"))
    weights = weights_of(model, 0.3, where)
    tail, starts = live.tail(weights)
    assert starts is live.starts[stage] and len(tail) == len(live.model) - stage
    with torch.no_grad():
        assert torch.equal(torch.cat(starts), torch.cat([live.model[:stage](x) for x in live.starts[0]]))
    early = []
    monkeypatch.setattr(type(live.model[stage - 2]), "forward", lambda m, x: early.append(m) or x, raising=False)
    live.tail(weights)
    assert not early  # asked again, the head does not run


def test_activations_are_worked_out_once(digits):
    live = Live(load_net("mlp", "digits"), digits)
    calls = []
    live.model.fc1.register_forward_hook(lambda *_: calls.append(1))
    for keep in (0.5, 0.2, 0.1):
        live.accuracy(weights_of(load_net("mlp", "digits"), keep, "fc2"))
    assert len(calls) == len(live.starts[0])


def test_a_question_changes_and_copies_nothing(lenet, lenet_live, monkeypatch):
    before = {n: (p, p.detach().clone()) for n, p in lenet_live.model.state_dict(keep_vars=True).items()}
    original = {n: t.clone() for n, t in lenet.state_dict().items()}
    weights = weights_of(lenet, 0.1)
    monkeypatch.setattr(nn.Module, "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
    monkeypatch.setattr(module, "with_plain_weights", lambda *_: pytest.fail("copied"))
    list(lenet_live.estimates(weights))
    lenet_live.accuracy(weights)
    after = lenet_live.model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[n] is p and torch.equal(p, values) for n, (p, values) in before.items())
    assert all(torch.equal(t, original[n]) for n, t in lenet.state_dict().items())


def test_left_in_the_middle_the_model_is_as_it_was(lenet, lenet_live):
    before = {n: p for n, p in lenet_live.model.named_parameters()}
    asked = lenet_live.estimates(weights_of(lenet, 0.01))
    next(asked)
    asked.close()
    assert all(p is before[n] for n, p in lenet_live.model.named_parameters())
    assert lenet_live.accuracy({}) == lenet_live.accuracy()


# Rounded inputs

COARSE = Affine(torch.tensor(0.5), torch.tensor(0.0), 4)
SIGNS = Steps(torch.zeros(1), torch.tensor([-1.0, 1.0]), spread=True)


def reading(**given):
    """A plan of which only the rounded inputs are looked at."""
    nothing = Masked(torch.zeros(1), torch.ones(1, dtype=torch.bool))
    return {name: Sited(nothing, rounding) for name, rounding in given.items()}


@pytest.mark.parametrize("given", [COARSE, SIGNS], ids=["affine", "signs with K"])
@pytest.mark.parametrize("name", ["conv2", "fc"])
def test_accuracy_with_rounded_inputs(digits, cnn_live, given, name):
    model = load_net("cnn", "digits")
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda m, x: (given.rounded(x[0]),))
    if given.spread:
        seen = []
        layer.register_forward_pre_hook(lambda m, x: seen.append(x[0]), prepend=True)
        bias = layer.bias.detach().reshape(-1, *[1] * (layer.weight.dim() - 2)) if layer.bias is not None else 0
        layer.register_forward_hook(lambda m, x, out: (out - bias) * spread(m, seen.pop()) + bias)
    with torch.no_grad():
        answers = model(as_input(digits.validation[0])).argmax(1)
    assert torch.equal(cnn_live.answers({}, reading(**{name: given})), answers[cnn_live.order])
    *_, (last, found) = cnn_live.estimates({}, reading(**{name: given}))
    assert last.exact and torch.equal(found, answers[cnn_live.order])


def spread(layer, x):
    """The mean of |x| over what each output sees, by a convolution with equal weights."""
    if isinstance(layer, nn.Linear):
        return x.abs().mean(1, keepdim=True)
    ones = torch.full_like(layer.weight[:1], 1 / layer.weight[0].numel())
    return nn.functional.conv2d(x.abs(), ones, None, layer.stride, layer.padding)


def test_a_rounded_input_alone_keeps_what_lies_before_it(cnn_live):
    tail, starts = cnn_live.tail({}, reading(fc=COARSE))
    assert starts is cnn_live.starts[8] and len(tail) == len(cnn_live.model) - 8
    first, earlier = cnn_live.tail({"fc.weight": cnn_live.model.fc.weight}, reading(conv2=COARSE))
    assert earlier is cnn_live.starts[3] and len(first) == len(cnn_live.model) - 3


def test_rounding_ends_with_the_answer_also_when_nobody_waits_for_the_rest(cnn_live):
    asked = cnn_live.batches({}, reading(conv2=COARSE, fc=SIGNS))
    next(asked)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in cnn_live.model.modules()]
    assert all(site_of(m) is None for m in cnn_live.model.modules()) and not any(hooks) and not cnn_live.lock.locked()
    asked.close()
    assert cnn_live.accuracy({}) == cnn_live.accuracy()


# Networks of the user's own


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(32, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.out(torch.cat([self.left(x).relu(), self.right(x).tanh()], 1))


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


def shared():
    relu = nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), relu, nn.Linear(32, 32), relu, nn.Linear(32, 10))


def twice():
    return Twice(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def nested():
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Sequential(nn.Linear(32, 10)))


@pytest.mark.parametrize("make", [Forked, shared, twice, nested])
@pytest.mark.parametrize("which", [0, -1])
def test_other_networks_give_the_same_figure(digits, make, which):
    model = make().eval()
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][which]
    live, (images, labels) = Live(model, digits.validation), digits.validation
    for keep in (0.3, 0.05):
        weights = weights_of(model, keep, name)
        changed = deepcopy(model)
        with torch.no_grad():
            changed.get_submodule(name).weight.copy_(weights[name])
            answers = changed(as_input(images)).argmax(1)
        assert torch.equal(live.answers(weights), answers[live.order])
        assert live.accuracy(weights) == (answers == labels).double().mean().item()


def test_a_network_left_in_training_mode_answers_as_in_evaluation(digits):
    model = build("cnn", "digits").train()
    live = Live(model, digits)
    assert live.accuracy({"fc": model.fc.weight.detach()}) == live.accuracy() == evaluate(model, digits)
    assert model.training


def test_a_part_is_that_part(digits):
    model = load_net("mlp", "digits")
    assert Live(model, digits, part="test").accuracy() == evaluate(model, digits, part="test")
