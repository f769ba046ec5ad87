"""Evidence against autograd and brute force, float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib.core.apply import weighted
from cmlib.core.inputs import sample, stratified
from cmlib.core.planner import gather
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build

F64 = torch.float64
LAYERS = {
    "plain": dict(),
    "stride": dict(stride=2),
    "padding": dict(padding=1),
    "groups": dict(groups=2),
    "dilation": dict(dilation=2),
    "all": dict(stride=(2, 1), padding=(1, 2), groups=2, dilation=(1, 2)),
    "depthwise": dict(groups=4, padding=1),
    "no bias": dict(bias=False),
}


def tiny(kind, inplace=False):
    """conv1 -> ReLU -> a convolution of the kind under test -> ReLU -> mean over places -> dense; float64, and 11 images."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 8, 3, **LAYERS[kind]), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(inplace), nn.Linear(5, 3),
    )  # fmt: skip
    return model.double().eval(), (torch.randn(11, 2, 9, 8, dtype=F64), torch.randint(0, 3, (11,)))


def brute_force(model, x):
    """Every example's Jacobian (N, C, weights) by layer, and the softmax's Hessian diag(p) - p p^T."""
    weights = {n + ".weight": m.weight.detach() for n, m in weighted(model).items()}
    each = lambda w, xi: torch.func.functional_call(model, w, xi[None])[0]  # noqa: E731
    jacobian = torch.func.vmap(torch.func.jacrev(each), in_dims=(None, 0))(weights, x)
    p = model(x).softmax(1).detach()
    return {n[:-7]: j for n, j in jacobian.items()}, torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_autograds(kind):
    model, (x, y) = tiny(kind)
    found = gather(model, weighted(model), "grad", (x, y))
    F.cross_entropy(model(x), y).backward()
    for name, layer in weighted(model).items():
        assert torch.allclose(found[name], layer.weight.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_diagonal_is_that_of_gauss_and_newton(kind, inplace):
    model, (x, y) = tiny(kind, inplace)
    found = gather(model, weighted(model), "hess_diag", (x, y))
    jacobian, inner = brute_force(tiny(kind)[0], x)
    for name, j in jacobian.items():
        expected = torch.einsum("nc...,ncd,nd...->...", j, inner, j) / len(x)
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-14)


def test_rows_give_the_whole_matrix_across_layers():
    model, (x, y) = tiny("all")
    rows = gather(model, weighted(model), "hess_rows", (x, y))
    flat = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
    jacobian, inner = brute_force(model, x)
    j = torch.cat([v.flatten(2) for v in jacobian.values()], dim=2)
    expected = torch.einsum("nci,ncd,ndj->ij", j, inner, j) / len(x)
    assert torch.allclose(flat.T @ flat / len(flat), expected, rtol=0, atol=1e-12)


def test_on_linear_regression_both_are_the_hessian():
    x, y = torch.randn(70, 5, dtype=F64), torch.randn(70, 2, dtype=F64)
    model, loss = nn.Linear(5, 2, bias=False).double(), lambda z, t: (z - t).square().sum(1).mean() / 2
    whole = torch.autograd.functional.hessian(lambda w: loss(x @ w.T, y), model.weight.detach().clone()).reshape(10, 10)
    holder = nn.Sequential(model)
    assert torch.allclose(gather(holder, weighted(holder), "hess_diag", (x, y), loss)["0"].flatten(), whole.diagonal(), rtol=0, atol=1e-12)
    rows = gather(holder, weighted(holder), "hess_rows", (x, y), loss)["0"].flatten(1)
    assert torch.allclose(rows.T @ rows / len(rows), whole, rtol=0, atol=1e-12)


def test_dense_layers_on_sequences_count_every_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Flatten(), nn.Linear(15, 3)).double()
    x, y = torch.randn(9, 3, 4, dtype=F64), torch.randint(0, 3, (9,))
    found = gather(model, weighted(model), "hess_diag", (x, y))
    jacobian, inner = brute_force(model, x)
    for name, j in jacobian.items():
        assert torch.allclose(found[name], torch.einsum("nc...,ncd,nd...->...", j, inner, j) / len(x), rtol=1e-9, atol=1e-14)
    gram = gather(model, weighted(model), "acts_gram", (x, y))["0"]
    assert torch.allclose(gram[0], x.flatten(0, 1).T @ x.flatten(0, 1) / 27, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_second_moment_of_inputs_is_that_of_the_patches(kind):
    """Brute force: each output place of the convolution reads one patch; found by convolving with one weight at a time."""
    model, (x, y) = tiny(kind)
    x = x.repeat(4, 1, 1, 1)  # more than one chunk
    gram = gather(model, weighted(model), "acts_gram", (x, y.repeat(4)))
    conv = model[2]
    seen = model[:2](x).detach()
    each = conv.out_channels // conv.groups
    patches = []
    for place in range(conv.weight[0].numel()):
        only = torch.zeros_like(conv.weight)
        only.flatten(1)[:, place] = 1
        patches.append(conv._conv_forward(seen, only, None)[:, ::each])
    y_all = torch.stack(patches, -1).transpose(1, 3).flatten(0, 2).transpose(0, 1)  # (groups, examples and places, k)
    assert torch.allclose(gram["2"], y_all.transpose(1, 2) @ y_all / y_all.shape[1], rtol=0, atol=1e-12)
    assert gram["2"].shape[0] == conv.groups


@pytest.mark.parametrize("kind", LAYERS)
def test_sampled_rows_are_what_outputs_are_products_of(kind):
    model, pair = tiny(kind)
    layers = weighted(model)
    for name, rows in gather(model, layers, "acts_rows", pair).items():
        w = layers[name].weight.detach()
        seen = []
        with torch.no_grad():
            handle = layers[name].register_forward_hook(lambda layer, i, o, seen=seen: seen.append(o))
            model(pair[0])
            handle.remove()
        bias = 0 if layers[name].bias is None else layers[name].bias.detach()
        made = torch.einsum("sgk,gok->sgo", rows, w.reshape(rows.shape[1], -1, rows.shape[2])).flatten(1) + bias
        out = seen[0].flatten(2).transpose(1, 2).flatten(0, 1) if seen[0].dim() == 4 else seen[0]
        assert len(made) == 11 * min(10, len(out) // 11) and torch.cdist(made, out).min(1).values.max() < 1e-6


def test_places_are_counted_among_the_covered_layers():
    model, pair = tiny("plain")
    assert list(gather(model, weighted(model), "place", pair).values()) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_beyond_sixteen_outputs_random_directions_stand_for_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 40)).double()
    x, y = torch.randn(300, 6, dtype=F64), torch.randint(0, 40, (300,))
    found = gather(model, weighted(model), "hess_diag", (x, y))
    jacobian, inner = brute_force(model, x)
    for name, j in jacobian.items():
        expected = torch.einsum("nc...,ncd,nd...->...", j, inner, j) / len(x)
        assert found[name].sum().item() == pytest.approx(expected.sum().item(), rel=0.1)
        assert ((found[name] - expected).norm() / expected.norm()).item() < 0.25


def test_evidence_leaves_the_model_as_it_was():
    model, data = tiny("all")
    model.train()
    model[3].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    for name in ("grad", "hess_diag", "hess_rows", "acts_gram"):
        gather(model, weighted(model), name, data)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_evidence_of_a_compressed_model_is_that_of_its_weights():
    model, data = tiny("all")
    copy = compress(model, "magnitude_pruning_han", keep=0.5)
    plain, _ = tiny("all")
    with torch.no_grad():
        for name, layer in weighted(plain).items():
            layer.weight.copy_(copy.get_submodule(name).weight)
    for evidence in ("grad", "hess_diag", "hess_rows", "acts_gram"):
        ours, theirs = (gather(m, weighted(m), evidence, data) for m in (copy, plain))
        assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-14) for n in theirs)


def test_batch_norm_is_used_as_in_evaluation(digits):
    model = build("cnn", "digits").double()
    x, y = digits.train[0][:64].double() / 255, digits.train[1][:64]
    found = gather(model.train(), weighted(model), "grad", (x, y))
    F.cross_entropy(model.eval()(x), y).backward()
    assert torch.allclose(found["conv1"], model.conv1.weight.grad, rtol=0, atol=1e-14)


def test_the_sample_is_fixed_and_stratified(digits):
    x, y = sample(digits, 200)
    again, _ = sample(digits, 200)
    assert torch.equal(x, again) and len(y) == 200
    share = torch.bincount(digits.train[1]).double() / len(digits.train[1])
    assert ((torch.bincount(y, minlength=10) - 200 * share).abs() < 1.5).all()
    assert sample(digits, 10**6)[0] is digits.train[0]


def test_every_prefix_of_a_stratified_order_has_its_share_of_each_class():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((500, 50, 5, 1))])[torch.randperm(556)]
    order = stratified(labels, 556, seed=4)
    assert sorted(order.tolist()) == list(range(556))
    share = torch.bincount(labels).double() / 556
    running = F.one_hot(labels[order]).cumsum(0)
    for count in range(1, 557):
        assert ((running[count - 1] - count * share).abs() < 2).all()
    assert torch.equal(stratified(labels, 100, seed=4), order[:100])
    assert not torch.equal(stratified(labels, 556, seed=5), order)


def test_frozen_weights_have_evidence_too_and_stay_frozen(mlp, digits64):
    data = digits64[0][:50], digits64[1][:50]
    wanted = {e: gather(mlp, weighted(mlp), e, data) for e in ("grad", "hess_diag", "hess_rows", "acts_gram")}
    mlp.requires_grad_(False)
    mlp.fc2.bias.requires_grad_(True)
    for name, found in wanted.items():
        assert all(torch.equal(v, found[n]) for n, v in gather(mlp, weighted(mlp), name, data).items())
    assert [n for n, p in mlp.named_parameters() if p.requires_grad] == ["fc2.bias"]


class Odd(nn.Module):
    """One layer used twice, one used once, one never."""

    def __init__(self):
        super().__init__()
        self.twice, self.once, self.never = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.once(self.twice(self.twice(x)).tanh())


def test_layers_used_twice_or_never_are_told_not_guessed():
    model, data = Odd(), (torch.rand(20, 4), torch.randint(0, 3, (20,)))
    for method in ("optimal_brain_damage", "layerwise_obs"):
        with pytest.raises(ValueError, match=r"layer twice is used more than once.*where"):
            plan(model, method, data=data)
    with pytest.raises(ValueError, match=r"layer never takes no part in the output.*no acts_gram.*where"):
        plan(model, "layerwise_obs", data=data, where="!twice")
    for method in ("snip", "optimal_brain_damage"):
        with pytest.raises(ValueError, match=r"layer never takes no part in the output.*where"):
            plan(model, method, data=data, where="!twice")
    assert plan(model, "snip", data=data, where="!never", keep=0.7)["twice"].kept > 0  # a gradient adds up over uses


class Branch(nn.Module):
    """A layer that runs and whose output nothing uses."""

    def __init__(self):
        super().__init__()
        self.used, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.aside(x)
        return self.used(x)


def test_a_layer_that_does_not_reach_the_output_is_told():
    data = (torch.rand(20, 4), torch.randint(0, 3, (20,)))
    for method in ("snip", "optimal_brain_damage", "optimal_brain_surgeon"):
        with pytest.raises(ValueError, match=r"layer aside takes no part in the output.*where"):
            plan(Branch(), method, data=data)
        assert plan(Branch(), method, data=data, where="used")["used"].kept > 0


def test_snip_without_any_gradient_is_a_tie_not_a_nan():
    model = nn.Sequential(nn.Linear(4, 3))
    kept = plan(model, "snip", data=(torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)), keep=0.5)["0"].mask
    assert kept.flatten().tolist() == [True] * 6 + [False] * 6


def test_errors_say_what_is_wanted(mlp, digits):
    with pytest.raises(ValueError, match=r"snip asks for grad, which needs data: pass data=load_data"):
        plan(mlp, "snip")
    with pytest.raises(ValueError, match=r"'gard'.*did you mean 'grad'.*acts_gram"):
        gather(mlp, weighted(mlp), "gard", digits)
    with pytest.raises(ValueError, match=r"as many labels as images, and some; got 3 images and 4 labels"):
        plan(mlp, "snip", data=(torch.rand(3, 1, 8, 8), torch.zeros(4, dtype=torch.int64)))
    line = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"2-D convolutions with zero padding, not Conv1d.*where"):
        plan(line, "optimal_brain_damage", data=(torch.rand(5, 1, 8), torch.zeros(5, dtype=torch.int64)))
