"""Histograms, the rules that read ranges off them, and codes against plain loops, numpy and torch's own fake quantization."""

import numpy as np
import pytest
import scipy.stats
import torch

from cmlib.lab import ranges
from cmlib.lab.ranges import RULES, Histogram, affine

F64 = torch.float64


def histogram(*parts):
    h = Histogram()
    for x in parts:
        h.add(x)
    return h


def test_a_histogram_grows_and_counts_everything():
    parts = [torch.randn(1000, dtype=F64) * s for s in (0.01, 3.0, 0.5)]
    parts[1][0] = -100.3
    everything = torch.cat(parts).numpy()
    h, backward = histogram(*parts), histogram(*parts[::-1])
    assert h.reach == 128.0 and (h.lo, h.hi) == (everything.min(), everything.max())
    assert (h.counts == np.histogram(everything, ranges.BINS, (-128, 128))[0]).all() and (backward.counts == h.counts).all()
    left = h.counts[: ranges.BINS // 2][::-1] + h.counts[ranges.BINS // 2 :]
    assert (h.magnitudes() == left[: len(h.magnitudes())]).all() and h.magnitudes().sum() == 3000 and h.magnitudes()[-1] > 0
    assert np.allclose(h.centers, -h.centers[::-1]) and np.diff(h.centers) == pytest.approx(h.width)


@pytest.mark.parametrize("share", [0.5, 0.99, 0.999, 0.9999])
def test_percentile_is_numpys_to_within_a_bin(share):
    x = torch.randn(50_000, dtype=F64)
    h = histogram(x)
    lo, hi = ranges.percentile(h, 8, share=share)
    exact = np.quantile(x.abs().numpy(), share, method="inverted_cdf")
    assert exact <= hi <= exact + h.width and lo == -hi
    assert ranges.percentile(histogram(x.abs()), 8, share=share) == (0, hi)
    assert ranges.percentile(histogram(x.clamp(-0.1)), 8, share=share)[0] == pytest.approx(-0.1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_squared_error_is_the_best_of_a_hundred_ranges(bits):
    x = torch.randn(20_000, dtype=F64) ** 3
    top = x.abs().max().item()

    def lost(t):
        return (affine(max(x.min().item(), -t), min(x.max().item(), t), bits).rounded(x) - x).square().mean().item()

    lo, hi = ranges.squared_error(histogram(x), bits)
    found, best = lost(max(-lo, hi)), min(lost(top * i / 100) for i in range(1, 101))
    assert best <= found <= 1.001 * best  # a bin's centre stands for its values
    assert bits == 8 or found < 0.7 * lost(top)


def divergence_by_hand(counts, i, levels):
    """KL(P || Q) where i bins stay, with loops and scipy's divergence, from TensorRT's slides."""
    p = list(counts[:i])
    p[-1] += sum(counts[i:])
    q = [0.0] * i
    for level in range(levels):
        bins = [b for b in range(i) if b * levels // i == level]
        there = [b for b in bins if counts[b] > 0]
        for b in there:
            q[b] = sum(counts[c] for c in bins) / len(there)
    return scipy.stats.entropy(p, q)


def entropy_by_hand(counts, levels, fewest):
    """(bins kept, least divergence); of equal ones, the most bins."""
    counts = [counts[1], *counts[1:]]
    found = {i: divergence_by_hand(counts, i, levels) for i in range(len(counts), max(levels, fewest) - 1, -1)}
    return min(found.items(), key=lambda item: item[1])


def test_divergence_leaves_out_empty_bins_and_is_infinite_where_nothing_stands_for_something():
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 50, 40) * (draw.random(40) < 0.6)
    found = [ranges.divergence(counts.astype(float), i, 8) for i in range(8, 41)]
    assert found == pytest.approx([divergence_by_hand(counts, i, 8) for i in range(8, 41)], rel=1e-9)
    assert np.isinf(found).sum() == sum(counts[i - 1] == 0 and counts[i:].sum() > 0 for i in range(8, 41)) > 3 and np.isfinite(found).sum() > 3


@pytest.mark.parametrize("both", [True, False])
def test_entropy_is_the_slides_procedure(monkeypatch, both):
    monkeypatch.setattr(ranges, "BINS", 128)
    monkeypatch.setattr(ranges, "FEWEST", 8)
    x = torch.distributions.StudentT(3.0).sample((4000,)).double()
    h = Histogram()
    h.add(x if both else x.abs())
    kept, least = entropy_by_hand(h.magnitudes(), 8 if both else 16, 8)
    assert kept < len(h.magnitudes())
    counts = h.magnitudes()
    counts[0] = counts[1]
    assert ranges.divergence(counts, kept, 8 if both else 16) == pytest.approx(least, rel=1e-9)
    assert ranges.entropy(h, 4) == h.within((kept + 0.5) * h.width)


def test_entropy_clips_long_tails_and_does_not_look_at_zeros():
    x = torch.distributions.StudentT(3.0).sample((100_000,)).double().abs()
    with_zeros = histogram(x, torch.zeros(1_000_000, dtype=F64))
    lo, hi = ranges.entropy(histogram(x), 8)
    assert lo == 0 and x.quantile(0.99) < hi < x.max() / 2
    assert ranges.entropy(with_zeros, 8) == (lo, hi)
    assert ranges.entropy(histogram(torch.randint(0, 256, (5000,)) / 255.0), 8) == (0, 1)  # nothing to gain


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_rule_stays_within_what_was_seen(how, bits):
    for x in (torch.randn(3000), torch.rand(3000) + 5.0, -torch.rand(3000) - 1e-3, torch.rand(3000) * 1e-6, torch.randn(3000) * 1e6):
        lo, hi = RULES[how](histogram(x), bits)
        assert min(0, x.min()) <= lo <= hi <= max(0, x.max()) and hi > min(lo, 0)
        assert affine(lo, hi, bits).scale > 0


def test_to_codes_and_back_is_torchs_fake_quantization_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        lo, hi = (torch.rand(2, generator=draw) * torch.tensor([-3.0, 3.0])).tolist()
        bits = int(torch.randint(2, 9, (1,), generator=draw))
        a, x = affine(lo, hi, bits), torch.randn(500, generator=draw) * 3
        x = torch.cat([x, (torch.arange(0, 40) - 20 + 0.5) * a.scale])  # halves on purpose
        expected = torch.fake_quantize_per_tensor_affine(x, a.scale.item(), int(a.zero), 0, 2**bits - 1)
        assert torch.equal(a.rounded(x), expected)


def test_codes_a_filter_are_torchs_too():
    w = torch.randn(12, 3, 5, 5) * torch.rand(12, 1, 1, 1)
    for bits in (2, 4, 8):
        a = ranges.weight_affine(w, bits, "filter")
        expected = torch.fake_quantize_per_channel_affine(w, a.scale.flatten(), a.zero.flatten(), 0, 0, 2**bits - 1)
        assert torch.equal(a.rounded(w), expected)


@pytest.mark.parametrize("lo, hi", [(-1.0, 1.0), (-0.3, 5.1), (1.0, 2.0), (-7.0, -3.0), (0.0, 1e-20), (-1e20, 3.0), (-1.0, 0.0)])
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_zero_is_exact_and_no_number_in_range_moves_more_than_half_a_step(lo, hi, bits):
    a = affine(lo, hi, bits)
    assert a.quantize(torch.zeros(1)).item() == a.zero and a.rounded(torch.zeros(1)).item() == 0
    assert 0 <= a.zero <= 2**bits - 1
    ends = a.dequantize(torch.tensor([0, 2**bits - 1]))
    x = torch.linspace(float(ends[0]), float(ends[1]), 999)  # the range that the nudged zero point gives
    assert (a.rounded(x) - x).abs().max() <= 0.5 * a.scale * (1 + 1e-5) + 3e-7 * x.abs().max()
    assert float(ends[0]) == pytest.approx(min(lo, 0), abs=0.51 * float(a.scale)) and float(ends[1]) == pytest.approx(
        max(hi, 0), abs=0.51 * float(a.scale)
    )


def test_codes_of_any_type_stand_for_the_same():
    a, q = affine(-1.0, 2.0), torch.arange(256)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(a.dequantize(q.to(dtype)), (q - 85) * a.scale) and int(a.zero) == 85


def test_a_range_that_does_not_hold_zero_needs_widening():
    scale, zero = torch.tensor(1 / 255), torch.tensor(0)  # (1, 2) as it stands: -255 clamped to 0
    assert ranges.Affine(scale, zero, 256).rounded(torch.tensor([2.0])).item() == pytest.approx(1.0)
    assert affine(1.0, 2.0).rounded(torch.tensor([2.0])).item() == pytest.approx(2.0)


def test_ranges_and_weights_without_a_scale_are_refused():
    for lo, hi, said in ((0.0, 0.0, "no scale"), (1.0, -1.0, "not one"), (0.0, torch.inf, "not one"), (torch.nan, 1.0, "not one")):
        with pytest.raises(ValueError, match=said):
            affine(lo, hi)
    for w, said in (
        (torch.zeros(3, 4), "all zero"),
        (torch.tensor([[1.0, torch.nan]]), "not finite"),
        (torch.tensor([[1.0, torch.inf]]), "not finite"),
    ):
        for per in ranges.PER:
            with pytest.raises(ValueError, match=said):
                ranges.weight_affine(w, 8, per)
    with pytest.raises(ValueError, match="per='channel' is not allowed: one of tensor, filter"):
        ranges.weight_affine(torch.ones(2, 2), 8, "channel")


def test_weights_that_are_all_alike_and_filters_of_zeros_are_exact():
    alike = torch.full((3, 4), -0.7)
    assert torch.allclose(ranges.weight_affine(alike, 4).rounded(alike), alike, rtol=1e-6)
    w = torch.randn(3, 2, 2, 2)
    w[1] = 0
    assert torch.equal(ranges.weight_affine(w, 3, "filter").rounded(w)[1], w[1])
