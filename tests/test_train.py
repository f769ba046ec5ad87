"""The one training loop and evaluation."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib.core.apply import attached
from cmlib.core.inputs import as_input
from cmlib.core.training import Hook
from cmlib.lab.train import evaluate, evaluating, fit, predict, shifted
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import NetError, build, card, load_net


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("batch", [7, 125, 10_000])
def test_evaluate_is_a_plain_loop(digits, net, batch):
    model = load_net(net, "digits")
    images, labels = digits.validation
    with torch.no_grad():
        right = sum(int(model(as_input(images[i : i + 1])).argmax()) == int(labels[i]) for i in range(len(labels)))
    assert evaluate(model, digits, batch=batch) == right / len(labels)
    assert evaluate(model, digits.validation) == right / len(labels)
    assert evaluate(model, digits, part="test") != evaluate(model, digits, part="train")


def test_predict_takes_bytes_and_floats_alike(digits):
    model = load_net("cnn", "digits")
    images = digits.validation[0]
    assert torch.allclose(predict(model, images), predict(model, images.float() / 255), rtol=0, atol=1e-6)
    assert not predict(model, images).requires_grad


def test_evaluating_gives_every_mode_back_even_after_an_error():
    model = build("cnn", "digits").train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize("net, floor", [("linear", 0.85), ("mlp", 0.85), ("cnn", 0.6)])
def test_fit_learns(digits, net, floor):
    model = build(net, "digits")
    before = evaluate(model, digits)
    run = fit(model, digits, epochs=12, lr=1e-2, batch=32)
    assert evaluate(model, digits) == run.best_accuracy > max(floor, before)
    assert [r["epoch"] for r in run.rows] == list(range(1, 13)) and run.rows[-1]["loss"] < run.rows[0]["loss"]
    assert run.best_accuracy == max(r["accuracy"] for r in run.rows) == run.rows[run.best_epoch - 1]["accuracy"]
    assert not run.interrupted and run.seconds > 0 and not model.training


def test_the_best_state_on_validation_is_the_one_left(digits):
    """A step rule that goes astray in the last epochs."""
    model, seen = build("mlp", "digits"), []

    def astray(m, rule):
        if len(seen) >= 3:
            with torch.no_grad():
                m.fc2.weight.zero_()
                m.fc2.bias.zero_()

    run = fit(model, digits, epochs=5, lr=1e-2, hooks=[Hook(after=astray)], progress=lambda row: seen.append(row))
    assert run.best_epoch == 3 and evaluate(model, digits) == run.rows[2]["accuracy"] > 0.3
    last = build("mlp", "digits")
    seen.clear()
    fit(last, digits, epochs=5, hooks=[Hook(after=astray)], progress=lambda row: seen.append(row), keep_best=False)
    assert (last.fc2.weight == 0).all()


@pytest.mark.parametrize("where", ["progress", "step"])
def test_an_interrupt_keeps_the_best_so_far(digits, where):
    model, states = build("mlp", "digits"), []

    def progress(row):
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        if where == "progress" and row["epoch"] == 2:
            raise KeyboardInterrupt

    def step(m, rule):
        if where == "step" and len(states) == 2:
            raise KeyboardInterrupt

    run = fit(model, digits, epochs=9, hooks=[Hook(before=step)], progress=progress)
    assert run.interrupted and len(run.rows) == 2 and evaluate(model, digits) == run.best_accuracy
    assert all(torch.equal(t, states[run.best_epoch - 1][n]) for n, t in model.state_dict().items())
    assert not model.training


def test_an_interrupt_of_a_compressed_model_keeps_its_masks(digits):
    copy = compress(build("mlp", "digits"), "magnitude_pruning_han", keep=0.1)

    def stop(row):
        raise KeyboardInterrupt

    assert fit(copy, digits, epochs=3, progress=stop).interrupted
    assert copy.fc1.weight.count_nonzero() == 2048 - round(0.9 * 2048)


def test_a_seed_is_a_run(digits):
    runs = {}
    for name, seed in (("a", 3), ("again", 3), ("b", 4)):
        torch.manual_seed(hash(name) % 1000)  # what went before does not matter
        torch.rand(5)
        model = compress(build("mlp", "digits"), "sparse_variational_dropout")
        state = torch.get_rng_state()
        runs[name] = [r["loss"] for r in fit(model, digits, epochs=2, seed=seed, augment=partial(shifted, by=1)).rows]
        assert torch.equal(torch.get_rng_state(), state)
    assert runs["a"] == runs["again"] != runs["b"]


def test_fit_is_a_plain_loop_written_out(digits):
    """AdamW at a constant rate, batches drawn by the seed: the same losses and weights, bit for bit."""
    images, labels = digits.train
    ours, plain = build("mlp", "digits"), build("mlp", "digits").train()
    run = fit(ours, digits, epochs=2, lr=1e-3, batch=100, weight_decay=0.01, schedule="constant", seed=7, keep_best=False)
    rule, draw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01), torch.Generator().manual_seed(7)
    for row in run.rows:
        losses = []
        for rows in torch.randperm(len(labels), generator=draw).split(100):
            rule.zero_grad()
            loss = F.cross_entropy(plain(images[rows].float() / 255), labels[rows])
            loss.backward()
            rule.step()
            losses.append(loss.item())
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert torch.allclose(ours.fc1.weight, plain.fc1.weight, rtol=0, atol=1e-6)


def test_hooks_run_in_their_order_around_each_step(digits):
    seen = []
    hook = Hook(
        before=lambda m, r: seen.append("before"),
        gradients=lambda m, r: seen.append("gradients" if m.fc1.weight.grad is not None else "none"),
        after=lambda m, r: seen.append("after"),
    )
    fit(build("mlp", "digits"), digits, epochs=1, batch=500, hooks=[hook])
    assert seen == ["before", "gradients", "after"] * 3


def test_progress_of_a_penalty_goes_from_0_to_1(digits):
    from dataclasses import replace

    from cmlib.core.apply import attach
    from cmlib.core.method import Training
    from cmlib.methods.prune import l1_weight_regularization as l1

    seen = []

    def watched(packed, examples, progress):
        seen.append((examples, progress))
        return 0.0 * packed.values.sum()

    model = build("mlp", "digits")
    method = replace(l1, training=Training(penalty=watched))
    attach(model.fc1, method(model.fc1.weight.detach()), method, {"lam": 0.1})
    fit(model, digits, epochs=2, batch=407)
    assert [round(p * 6) for _, p in seen] == list(range(6)) and {n for n, _ in seen} == {1221}


def test_the_schedule_rises_for_a_tenth_and_falls_to_nothing(digits):
    rates = []
    fit(build("linear", "digits"), digits, epochs=10, lr=0.1, hooks=[Hook(before=lambda m, r: rates.append(r.param_groups[0]["lr"]))])
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.02) and top / len(rates) == pytest.approx(0.1, abs=0.02)
    assert rates[0] < 0.01 and rates[-1] < 0.001
    assert all(a < b for a, b in zip(rates[:top], rates[1 : top + 1])) and all(a > b for a, b in zip(rates[top:-1], rates[top + 1 :]))
    rates.clear()
    fit(
        build("linear", "digits"),
        digits,
        lr=0.1,
        schedule="constant",
        hooks=[Hook(before=lambda m, r: rates.append(r.param_groups[0]["lr"]))],
    )
    assert set(rates) == {0.1}


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"batch": 0}, {"lr": -0.1}, {"schedule": "linear"}, {"data": None}])
def test_settings_that_make_no_sense_are_refused(digits, wrong):
    with pytest.raises(ValueError, match=r"fit needs epochs >= 0|schedule='linear'; allowed|data must be"):
        fit(build("mlp", "digits"), **{"data": digits, **wrong})


def test_no_epochs_change_nothing(digits):
    model = build("mlp", "digits")
    before = model.fc1.weight.detach().clone()
    assert fit(model, digits, epochs=0).rows == [] and torch.equal(model.fc1.weight, before)


def test_frozen_parameters_stay(digits):
    model = build("mlp", "digits")
    model.fc1.weight.requires_grad_(False)
    before = model.fc1.weight.clone(), model.fc2.weight.detach().clone()
    fit(model, digits)
    assert torch.equal(model.fc1.weight, before[0]) and not torch.equal(model.fc2.weight, before[1])


def test_shifted_moves_each_image_over_black():
    x = torch.zeros(300, 1, 7, 7)
    x[:, 0, 3, 2] = 1
    moved = shifted(x, torch.Generator().manual_seed(0), by=2)
    rows, columns = moved[:, 0].flatten(1).argmax(1).div(7, rounding_mode="floor"), moved[:, 0].flatten(1).argmax(1) % 7
    assert (moved.flatten(1).sum(1) == 1).all() and rows.unique().tolist() == [1, 2, 3, 4, 5] and columns.unique().tolist() == [0, 1, 2, 3, 4]
    mirrored = shifted(x, torch.Generator().manual_seed(0), by=0, flip=True)[:, 0, 3]
    assert 100 < int(mirrored[:, 4].sum()) < 200 and (mirrored[:, 2] + mirrored[:, 4] == 1).all()


def test_learning_methods_train_through_fit_and_get_sparser(digits):
    """Each reaches a mask of its own on the trained digits MLP in 8 epochs (the gates in 15), and stays well above chance (0.1)."""
    settings = {
        "l1_weight_regularization": {"lam": 1e-2},
        "dynamic_network_surgery": {"c": 0.5},
        "sparse_variational_dropout": {"log_sigma2": -5.0},
        "l0_hard_concrete": {"lam": 10.0},
    }
    for method, knobs in settings.items():
        copy = compress(load_net("mlp", "digits"), method, **knobs)
        rule = {"lr": 0.1, "optimizer": torch.optim.SGD} if method.startswith("l1") else {"lr": 0.02, "optimizer": torch.optim.Adam}
        fit(copy, digits, epochs=15 if method.startswith("l0") else 8, batch=64, keep_best=False, **rule)
        kept = sum(int((layer.weight != 0).sum()) for _, layer, _ in attached(copy.eval()))
        assert kept < 0.9 * 2368 and evaluate(copy, digits) > 0.6, (method, kept)


def test_nets_are_built_from_their_seed_and_errors_say_what_there_is():
    first, same, other = (build("mlp", "digits", s) for s in (1, 1, 2))
    assert torch.equal(first.fc1.weight, same.fc1.weight) and not torch.equal(first.fc1.weight, other.fc1.weight)
    for call, says in [
        (partial(build, "lenet", "mnist"), "no network 'lenet'"),
        (partial(build, "mlp", "svhn"), "no data set 'svhn'"),
        (partial(build, "lenet5", "digits"), "not made for 8 by 8"),
        (partial(load_net, "mlp", "digits", 77), "mlp-digits-77.*train --net mlp --data digits --seed 77"),
    ]:
        with pytest.raises(NetError, match=says):
            call()


@pytest.mark.parametrize("net", ["linear", "mlp", "cnn"])
def test_checkpoints_have_the_accuracy_that_their_cards_say(digits, net):
    for seed in range(3):
        model = load_net(net, "digits", seed)
        assert evaluate(model, digits) == pytest.approx(card(net, "digits", seed)["validation_accuracy"], abs=0.005)
        assert evaluate(model, digits, part="test") == pytest.approx(card(net, "digits", seed)["test_accuracy"], abs=0.006)
        assert isinstance(model, nn.Module) and not model.training


def test_evaluating_a_plain_network_in_another_thread_leaves_training_alone(digits):
    """torch's cache of attached weights is one for all threads: whoever needs none must not hold it open."""
    plain, ready, done = build("mlp", "digits"), threading.Event(), threading.Event()

    def elsewhere():
        with evaluating(plain):
            ready.set()
            done.wait(30)

    worker = threading.Thread(target=elsewhere)
    worker.start()
    ready.wait(30)
    try:
        fit(compress(build("mlp", "digits"), "magnitude_pruning_han", keep=0.5), digits, epochs=1, batch=500)
    finally:
        done.set()
        worker.join()
