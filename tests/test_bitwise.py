"""Products by counting bits against the same products in whole numbers or float64; ties and padding on purpose."""

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib.core import bitwise

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 100, 128, 129, 800)


def signs(*shape):
    return torch.randint(0, 2, shape).double() * 2 - 1


@pytest.mark.parametrize("n", LENGTHS)
def test_words_hold_every_bit_and_zeros_behind(n):
    bits = torch.randint(0, 2, (5, n)).bool().numpy()
    packed = bitwise.words(bits)
    assert packed.dtype == np.uint64 and packed.shape == (5, -(-n // 64))
    back = np.unpackbits(packed.view(np.uint8), axis=-1)
    assert (back[:, :n] == bits).all() and not back[:, n:].any()


@pytest.mark.parametrize("n", LENGTHS)
def test_xnor_dot_is_the_product_of_signs_at_any_length(n):
    a, b = signs(9, n), signs(6, n)
    assert torch.equal(bitwise.xnor_dot(a, b).double(), a @ b.T)


def test_counting_in_parts_changes_nothing(monkeypatch):
    a, b = signs(50, 70), signs(7, 70)
    whole = bitwise.xnor_dot(a, b)
    monkeypatch.setattr(bitwise, "CACHED", 7 * 3)  # three rows at once, and two in the last part
    assert torch.equal(bitwise.xnor_dot(a, b), whole)
    monkeypatch.setattr(bitwise, "CACHED", 1)
    assert torch.equal(bitwise.xnor_dot(a, b), whole)


def test_zero_counts_as_plus_one():
    assert bitwise.xnor_dot(torch.tensor([[0.0, -0.0, -1e-30]]), torch.ones(1, 3)).tolist() == [[1]]


@pytest.mark.parametrize("rows, n, out", [(1, 800, 500), (33, 65, 10)])
def test_xnor_linear(rows, n, out):
    x, w = torch.randn(rows, n).double(), torch.randn(out, n).double()
    found = bitwise.xnor_linear(x, bitwise.pack_signs(w))
    assert found.dtype == torch.int32 and torch.equal(found.double(), F.linear(x.sign(), w.sign()))


@pytest.mark.parametrize("fill", [-1, 1])
@pytest.mark.parametrize(
    "channels, filters, k, stride, padding", [(1, 3, 5, 1, 0), (20, 5, 5, 1, 2), (8, 4, 3, 2, 1), (65, 2, 1, 1, 0), (3, 4, 2, 3, 1)]
)
def test_xnor_convolution_under_each_padding_rule(channels, filters, k, stride, padding, fill):
    x, w = torch.randn(2, channels, 9, 8).double(), torch.randn(filters, channels, k, k).double()
    found = bitwise.xnor_conv2d(x, bitwise.pack_signs(w), stride=stride, padding=padding, fill=fill)
    truth = F.conv2d(F.pad(x.sign(), (padding,) * 4, value=fill), w.sign(), stride=stride)
    assert found.dtype == torch.int32 and torch.equal(found.double(), truth)


def test_padding_with_a_sign_is_not_padding_with_zero():
    x, w = signs(1, 4, 6, 6), bitwise.pack_signs(signs(2, 4, 3, 3))
    low, high = (bitwise.xnor_conv2d(x, w, padding=1, fill=f) for f in (-1, 1))
    assert not torch.equal(low, high)
    assert torch.equal(low[..., 1:-1, 1:-1], high[..., 1:-1, 1:-1])
    assert torch.equal(low[..., 1:-1, 1:-1], bitwise.xnor_conv2d(x, w))


def test_scaled_signs_give_the_real_convolution_at_every_valid_position():
    alpha, beta = torch.rand(5, 1, 1).double() + 0.5, 0.75
    x, w = beta * signs(3, 6, 7, 7), signs(5, 6, 3, 3) * alpha[:, None]
    assert torch.allclose(alpha * beta * bitwise.xnor_conv2d(x, bitwise.pack_signs(w)), F.conv2d(x, w), rtol=0, atol=1e-12)


def test_packed_signs_are_small_and_read_channels_last():
    packed = bitwise.pack_signs(torch.randn(50, 20, 5, 5))
    assert packed.words.shape == (50, -(-25 * 3 // 8)) and packed.fan_in == 500  # 20 channels take 3 bytes a place
    assert bitwise.pack_signs(torch.randn(500, 800)).words.nbytes == 500 * 104  # 800 bits, rounded up to 13 words


@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 1)])
def test_bwn_needs_additions_only(stride, padding):
    x, w = torch.randn(2, 3, 9, 8).double(), torch.randn(4, 3, 3, 3).double()
    scaled = w.abs().mean((1, 2, 3), keepdim=True) * w.sign()
    assert torch.allclose(bitwise.added_conv2d(x, w, stride=stride, padding=padding), F.conv2d(x, scaled, stride=stride, padding=padding), atol=1e-12)


@pytest.mark.parametrize("a_bits, b_bits, n", [(1, 1, 64), (2, 3, 9), (8, 8, 131), (5, 1, 200), (16, 12, 70)])
def test_bit_planes_give_the_product_of_codes(a_bits, b_bits, n):
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 1 << a_bits, (6, n)), draw.integers(0, 1 << b_bits, (5, n))
    assert (bitwise.bitplane_dot(a, b, a_bits, b_bits) == a @ b.T).all()


def test_bit_planes_of_the_largest_codes():
    a = np.full((1, 5000), 65_535)
    assert bitwise.bitplane_dot(a, a, 16, 16).item() == 5000 * 65_535**2  # beyond 32 bits


@pytest.mark.parametrize("per_channel", [False, True])
def test_products_of_learned_bases(per_channel):
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 7, 77)).astype(bool), draw.integers(0, 2, (3, 5, 77)).astype(bool)
    u, v = draw.random(2), draw.random((3, 5) if per_channel else 3)
    weights = np.einsum("jo,jon->on", np.broadcast_to(v.reshape(3, -1), (3, 5)), 2.0 * b - 1)
    signed, unsigned = np.einsum("i,irn->rn", u, 2.0 * a - 1), np.einsum("i,irn->rn", u, 1.0 * a)
    assert np.allclose(bitwise.signed_basis_dot(a, b, u, v), signed @ weights.T, rtol=0, atol=1e-9)
    assert np.allclose(bitwise.unsigned_basis_dot(a, b, u, v), unsigned @ weights.T, rtol=0, atol=1e-9)


def test_the_signed_formula_is_wrong_for_activations_of_zero_and_one():
    a, b = np.array([[[True, False, False]]]), np.array([[[True, True, False]]])
    u = v = np.ones(1)
    assert bitwise.unsigned_basis_dot(a, b, u, v).item() == 1  # 1 x 1 + 0 x 1 + 0 x -1
    assert bitwise.signed_basis_dot(a, b, u, v).item() == 1 - 1 + 1
    b = ~b
    assert bitwise.unsigned_basis_dot(a, b, u, v).item() == -1 and bitwise.signed_basis_dot(a, b, u, v).item() == -1 + 1 - 1
    a = np.array([[[True, True, False]]])
    assert bitwise.unsigned_basis_dot(a, b, u, v).item() == -2 and bitwise.signed_basis_dot(a, b, u, v).item() == -3


def norm_of(gamma, beta, mean, var):
    norm = nn.BatchNorm1d(len(gamma), eps=0.0).double().eval()
    for t, value in ((norm.weight.data, gamma), (norm.bias.data, beta), (norm.running_mean, mean), (norm.running_var, var)):
        t.copy_(torch.as_tensor(value, dtype=torch.float64))
    return norm


def test_batch_norm_and_sign_are_one_comparison_a_channel():
    norm = networks.stirred(nn.Sequential(nn.BatchNorm2d(40)), dtype=torch.float64)[0]
    with torch.no_grad():
        norm.weight.sub_(1.0)  # both directions
    x = torch.randn(50, 40, 3, 3).double()
    assert (norm.weight < 0).any() and (norm.weight > 0).any()
    assert torch.equal(bitwise.above(x, *bitwise.sign_thresholds(norm)), norm(x) >= 0)


def test_ties_go_to_plus_one_in_both_directions():
    norm = norm_of([0.5, -0.5, 2.0, -2.0], [1.0, 1.0, -3.0, -3.0], [3.0, 3.0, -1.0, -1.0], [4.0] * 4)  # dyadic: ties are exact
    x = torch.arange(-30, 31).double()[:, None].expand(-1, 4)
    tau, direction = bitwise.sign_thresholds(norm)
    assert (x == tau).any(0).all()
    assert torch.equal(bitwise.above(x, tau, direction), norm(x) >= 0)
    strict = torch.where(direction > 0, x >= tau, x < tau)  # as the rule is often written
    assert not torch.equal(strict, norm(x) >= 0)


def test_a_channel_without_scale_is_constant():
    norm = norm_of([0.0, 0.0, -0.0], [0.25, -0.25, 0.0], [1.0] * 3, [1.0] * 3)
    x = torch.randn(20, 3).double()
    assert torch.equal(bitwise.above(x, *bitwise.sign_thresholds(norm)), torch.tensor([True, False, True]).expand(20, 3))


def test_a_norm_without_parameters():
    norm = nn.BatchNorm1d(3, affine=False).double().eval()
    norm.running_mean.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    x = torch.randn(50, 3).double() * 3
    assert torch.equal(bitwise.above(x, *bitwise.sign_thresholds(norm)), norm(x) >= 0)


def test_what_does_not_fit_is_named():
    w = bitwise.pack_signs(signs(2, 3, 3, 3))
    with pytest.raises(ValueError, match="70 entries and those of b 64"):
        bitwise.xnor_dot(signs(2, 70), signs(2, 64))  # both two words long
    with pytest.raises(ValueError, match="fill=0"):
        bitwise.xnor_conv2d(signs(1, 3, 5, 5), w, padding=1, fill=0)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 5\) does not fit"):
        bitwise.xnor_conv2d(signs(1, 4, 5, 5), w)
    with pytest.raises(ValueError, match="does not fit a dense weight"):
        bitwise.xnor_linear(signs(2, 4), bitwise.pack_signs(signs(3, 5)))
    for codes in (np.array([[4]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="0 to 3"):
            bitwise.planes(codes, 2)
