"""Accuracy while the hand moves: intervals that hold, figures that are those of ``evaluate``, a model that no question changes."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from cmlib.core.inputs import as_input
from cmlib.lab.data import load_data
from cmlib.lab.train import evaluate
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.view import live as module
from cmlib.view.live import FIRST, HALF_WIDTH, Live, interval

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


def first_shown(hits, batch=125):
    """The estimate at which ``Live.estimates`` would first show one, for images answered rightly (1) or not (0) in this order."""
    counts = hits.cumsum(1)
    found = []
    for row in counts:
        for done in range(batch, len(row) + batch, batch):
            done = min(done, len(row))
            now = interval(int(row[done - 1]), done, len(row))
            if now.exact or (done >= FIRST and now.half <= HALF_WIDTH):
                break
        found.append(now)
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.995])
def test_intervals_cover_the_exact_figure(share):
    total, draws = 5_000, 2_000
    right = round(share * total)
    order = torch.rand(draws, total).argsort(1)
    shown = first_shown((order < right).int())
    covered = sum(abs(e.accuracy - right / total) <= e.half for e in shown) / draws
    assert covered >= 0.94
    assert all(e.half <= HALF_WIDTH for e in shown)
    assert any(not e.exact for e in shown)


@pytest.mark.parametrize("share", [0.6, 0.93, 0.98])
def test_intervals_cover_in_a_small_set(share):
    total = 1_000
    right = round(share * total)
    order = torch.rand(2_000, total).argsort(1)
    shown = first_shown((order < right).int())
    assert sum(abs(e.accuracy - right / total) <= e.half + 1e-12 for e in shown) >= 0.94 * 2_000


def test_all_images_done_is_the_figure_itself():
    found = interval(433, 500, 500)
    assert (found.accuracy, found.half, found.exact) == (433 / 500, 0.0, True)


def test_an_interval_narrows_with_the_images_and_stays_open_at_the_ends():
    halves = [interval(9 * n // 10, n, 5_000).half for n in (250, 500, 1_000, 2_500, 4_990)]
    assert halves == sorted(halves, reverse=True) and halves[-1] < 0.001
    for correct in (0, 250):  # all or none right so far does not mean all or none right
        assert 0 < interval(correct, 250, 5_000).half < HALF_WIDTH


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
    assert last.accuracy == lenet_live.accuracy(weights)
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
    monkeypatch.setattr(module, "baked", lambda *_: pytest.fail("copied"))
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
