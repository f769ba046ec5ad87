"""Solutions of exercise 02 that the graders are tried with: right ones unlike the source notebook's own, and wrong ones by their fault."""

import itertools
import math

import numpy as np
import torch
from tried import Solutions

from cmlib.core.storage import encode, nbytes
from cmlib.grade.variants import variant
from cmlib.lab.verbs import plan

solutions = Solutions("chapter02", ladders=("2.13",))
right, wrong = solutions.right, solutions.wrong


# 2.1 magnitude_mask(w, keep)


def by_order(scores, keep, best=True):
    """The flat mask of the n - round((1 - keep) n) highest (or lowest) scores."""
    stays = scores.numel() - round((1 - keep) * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=best, stable=True)[:stays]] = True
    return mask


@right("2.1")
def a_loop_over_sorted_pairs(w, keep):
    flat = w.flatten().tolist()
    ranked = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    stays = set(ranked[: len(flat) - round((1 - keep) * len(flat))])
    return torch.tensor([i in stays for i in range(len(flat))]).reshape(w.shape)


@right("2.1")
def numpys_lexsort(w, keep):
    size = w.abs().numpy().ravel()
    order = np.lexsort((-np.arange(size.size), size))  # the last ones stay
    mask = np.ones(size.size, bool)
    mask[order[: round((1 - keep) * size.size)]] = False
    return torch.from_numpy(mask.reshape(w.shape))


@right("2.1")
def a_threshold_and_a_count_of_ties(w, keep):
    size = w.abs().flatten()
    stays = len(size) - round((1 - keep) * len(size))
    if stays == 0:
        return torch.zeros_like(w, dtype=torch.bool)
    bound = size.topk(stays).values[-1]
    above, ties = size > bound, size == bound
    return (above | (ties & (ties.cumsum(0) <= stays - above.sum()))).reshape(w.shape)


@wrong("2.1", "the sign was not dropped")
def signed(w, keep):
    return by_order(w, keep).reshape(w.shape)


@wrong("2.1", "the largest went, the smallest stay")
def smallest_stay(w, keep):
    return by_order(w.abs(), keep, best=False).reshape(w.shape)


@wrong("2.1", "exactly round((1 - keep) n) weights go")
def count_rounded_down(w, keep):
    mask = torch.ones(w.numel(), dtype=torch.bool)
    mask[w.abs().flatten().argsort(descending=True, stable=True)[w.numel() - int((1 - keep) * w.numel()) :]] = False
    return mask.reshape(w.shape)


@wrong("2.1", "of equal sizes the higher index stays")
def drops_from_the_front(w, keep):
    mask = torch.ones(w.numel(), dtype=torch.bool)
    mask[w.abs().flatten().argsort(stable=True)[: round((1 - keep) * w.numel())]] = False
    return mask.reshape(w.shape)


@wrong("2.1", "all of a size stay or go together")
def threshold_alone(w, keep):
    stays = w.numel() - round((1 - keep) * w.numel())
    bound = w.abs().flatten().sort(descending=True).values[stays - 1] if stays else torch.inf
    return w.abs() >= bound


@wrong("2.1", "keep = 1 keeps all, keep = 0 none")
def slice_from_minus_zero(w, keep):
    mask = torch.ones(w.numel(), dtype=torch.bool)
    mask[w.abs().flatten().argsort(descending=True, stable=True)[-round((1 - keep) * w.numel()) :]] = False
    return mask.reshape(w.shape)


@wrong("2.1", "in the shape of w: wrong shape")
def left_flat(w, keep):
    return by_order(w.abs(), keep)


@wrong("2.1", "the mask is not of booleans")
def noughts_and_ones(w, keep):
    return by_order(w.abs(), keep).reshape(w.shape).to(w)


@wrong("2.1", "exactly round((1 - keep) n) weights go")
def quantile_as_threshold(w, keep):
    return w.abs() > w.abs().double().flatten().quantile(1 - keep)


@wrong("2.1", "wrong shape")
def known_by_heart(w, keep):
    return torch.tensor([True, True, False, False]) if w.numel() == 4 else torch.tensor([[False, True, True], [True, False, False]])


# 2.2 my_bytes, from the learner's numbers


def counted(mine):
    total = mine["rows"] * mine["columns"]
    return total, total - round((1 - mine["keep"]) * total)


def narrow(most):
    return 1 if most < 2**8 else 2 if most < 2**16 else 4


def said(mine, **other):
    total, kept = counted(mine)
    csr = kept * (4 + narrow(mine["columns"])) + (mine["rows"] + 1) * narrow(kept)
    return {"dense": 4 * total, "bitmap": math.ceil(total / 8) + 4 * kept, "csr": csr} | other


@right("2.2")
def of_arrays_that_are_really_there(mine):
    mask = np.zeros(mine["rows"] * mine["columns"], bool)
    mask[: counted(mine)[1]] = True
    mask = np.random.default_rng(0).permutation(mask).reshape(mine["rows"], -1)
    made = {form: encode(np.ones(mask.shape, np.float32), mask, form)[0] for form in ("dense", "bitmap", "csr")}
    return {form: sum(a.nbytes for a in arrays.values()) for form, arrays in made.items()}


@right("2.2")
def in_bits(mine):
    bits = {form: 8 * size for form, size in said(mine).items()}
    return {form: -(-size // 8) for form, size in bits.items()}


@wrong("2.2", "bytes as dense, with your numbers: the zeros are stored too")
def dense_without_zeros(mine):
    return said(mine, dense=4 * counted(mine)[1])


@wrong("2.2", "the bitmap has a bit a weight")
def bitmap_of_bytes(mine):
    total, kept = counted(mine)
    return said(mine, bitmap=total + 4 * kept)


@wrong("2.2", "the bitmap is missing")
def values_alone(mine):
    return said(mine, bitmap=4 * counted(mine)[1])


@wrong("2.2", "the row starts are missing")
def no_row_starts(mine):
    return said(mine, csr=counted(mine)[1] * (4 + narrow(mine["columns"])))


@wrong("2.2", "there is a row start more than rows")
def a_start_too_few(mine):
    return said(mine, csr=said(mine)["csr"] - narrow(counted(mine)[1]))


@wrong("2.2", "the indices are narrower than the values")
def indices_of_four_bytes(mine):
    return said(mine, csr=counted(mine)[1] * 8 + (mine["rows"] + 1) * 4)


@wrong("2.2", "with your numbers: wrong value")
def of_the_neighbours_numbers(mine):
    return said(mine | {"rows": mine["rows"] + 20})


@wrong("2.2", "is `student` yours?")
def nobodys(mine):
    return said(variant("", "2.2"))


@wrong("2.2", "my_bytes is a dict that says csr")
def without_csr(mine):
    return {form: size for form, size in said(mine).items() if form != "csr"}


@wrong("2.2", "these are bits")
def all_in_bits(mine):
    return {form: 8 * size for form, size in said(mine).items()}


# 2.3 sparsity_at(t, t0, n, delta, s_i, s_f)


def cubic(done, n, s_i, s_f, power=3):
    return s_f + (s_i - s_f) * (1 - done / n) ** power


def steps_done(t, t0, n, delta):
    return min(max((t - t0) // delta, 0), n)


@right("2.3")
def step_after_step(t, t0, n, delta, s_i, s_f):
    found = s_i
    for r in range(1, n + 1):
        if t >= t0 + r * delta:
            found = s_f - (s_f - s_i) * ((n - r) / n) ** 3
    return found


@right("2.3")
def of_a_tensor(t, t0, n, delta, s_i, s_f):
    left = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    curve = s_f * (1 - left**3) + s_i * left**3
    return curve[torch.tensor((t - t0) // delta).clamp(0, n)]


@wrong("2.3", "the curve is a straight line")
def linear(t, t0, n, delta, s_i, s_f):
    return cubic(steps_done(t, t0, n, delta), n, s_i, s_f, power=1)


@wrong("2.3", "the curve is a square")
def squared(t, t0, n, delta, s_i, s_f):
    return cubic(steps_done(t, t0, n, delta), n, s_i, s_f, power=2)


@wrong("2.3", "between two pruning steps nothing changes")
def at_every_step(t, t0, n, delta, s_i, s_f):
    return cubic(min(max((t - t0) / delta, 0), n), n, s_i, s_f)


@wrong("2.3", "before t0 the first sparsity, after the last step the last")
def without_ends(t, t0, n, delta, s_i, s_f):
    return cubic((t - t0) // delta, n, s_i, s_f)


@wrong("2.3", "after the last step the last")
def without_an_end(t, t0, n, delta, s_i, s_f):
    return cubic(max((t - t0) // delta, 0), n, s_i, s_f)


@wrong("2.3", "before t0 the first sparsity")
def from_zero_on(t, t0, n, delta, s_i, s_f):
    return cubic(steps_done(t, 0, n, delta), n, s_i, s_f)


@wrong("2.3", "s_i plays no part")
def first_sparsity_left_out(t, t0, n, delta, s_i, s_f):
    return cubic(steps_done(t, t0, n, delta), n, 0, s_f)


@wrong("2.3", "s_i and s_f are exchanged")
def ends_exchanged(t, t0, n, delta, s_i, s_f):
    return cubic(steps_done(t, t0, n, delta), n, s_f, s_i)


@wrong("2.3", "one pruning step too many is counted")
def a_step_too_early(t, t0, n, delta, s_i, s_f):
    return cubic(min(max((t - t0) // delta + 1, 0), n), n, s_i, s_f)


@wrong("2.3", "this is the share that stays")
def share_kept(t, t0, n, delta, s_i, s_f):
    return 1 - cubic(steps_done(t, t0, n, delta), n, s_i, s_f)


@wrong("2.3", "at the pruning steps, the cubic curve")
def known_values(t, t0, n, delta, s_i, s_f):
    return {100: 0.0, 109: 0.0, 110: 0.7, 115: 0.7, 120: 0.8}.get(t, 0.8)


# 2.4 obd_cut(w, hess_diag, count)


def cut(saliency, count):
    mask = torch.ones(saliency.numel(), dtype=torch.bool)
    mask[saliency.flatten().argsort(stable=True)[:count]] = False
    return mask.reshape(saliency.shape)


@right("2.4")
def one_after_the_other(w, hess_diag, count):
    saliency = [0.5 * h * v * v for v, h in zip(w.flatten().tolist(), hess_diag.flatten().tolist())]
    mask, rise = [True] * len(saliency), 0.0
    for i in sorted(range(len(saliency)), key=saliency.__getitem__)[:count]:
        mask[i], rise = False, rise + saliency[i]
    return torch.tensor(mask).reshape(w.shape), rise


@right("2.4")
def with_topk(w, hess_diag, count):
    found = (hess_diag * w.square() / 2).flatten().topk(count, largest=False)
    mask = torch.ones_like(w, dtype=torch.bool)
    mask.view(-1)[found.indices] = False
    return mask, found.values.sum()


@wrong("2.4", "the curvature plays no part")
def size_alone(w, hess_diag, count):
    mask = cut(w.abs(), count)
    return mask, (0.5 * hess_diag * w**2)[~mask].sum()


@wrong("2.4", "w is not squared")
def curvature_times_size(w, hess_diag, count):
    mask = cut(hess_diag * w.abs(), count)
    return mask, (0.5 * hess_diag * w**2)[~mask].sum()


@wrong("2.4", "the factor 1/2 is missing")
def half_missing(w, hess_diag, count):
    saliency = hess_diag * w**2
    return cut(saliency, count), saliency.flatten().sort().values[:count].sum()


@wrong("2.4", "this is the sum over what stays")
def rise_of_what_stays(w, hess_diag, count):
    saliency = 0.5 * hess_diag * w**2
    return cut(saliency, count), saliency[cut(saliency, count)].sum()


@wrong("2.4", "this is the mean of the saliencies")
def mean_rise(w, hess_diag, count):
    saliency = 0.5 * hess_diag * w**2
    return cut(saliency, count), saliency[~cut(saliency, count)].mean()


@wrong("2.4", "where the loss bends down (h < 0)")
def curvature_without_sign(w, hess_diag, count):
    saliency = 0.5 * hess_diag.abs() * w**2
    return cut(saliency, count), saliency[~cut(saliency, count)].sum()


@wrong("2.4", "the mask has another shape than w")
def mask_left_flat(w, hess_diag, count):
    saliency = 0.5 * (hess_diag * w**2).flatten()
    return cut(saliency, count), saliency[~cut(saliency, count)].sum()


@wrong("2.4", "two values are asked for: mask and rise")
def mask_alone(w, hess_diag, count):
    return cut(0.5 * hess_diag * w**2, count)


@wrong("2.4", "the highest went")
def removes_the_highest(w, hess_diag, count):
    saliency = 0.5 * hess_diag * w**2
    return cut(-saliency, count), saliency[~cut(-saliency, count)].sum()


# 2.5 network_masks(weights, keep, scope)


def for_each_layer(weights, keep):
    return {n: by_order(w.abs(), keep).reshape(w.shape) for n, w in weights.items()}


def for_all_at_once(weights, keep):
    mask, start, masks = by_order(torch.cat([w.abs().flatten() for w in weights.values()]), keep), 0, {}
    for name, w in weights.items():
        masks[name] = mask[start : start + w.numel()].reshape(w.shape)
        start += w.numel()
    return masks


@right("2.5")
def cut_up_by_hand(weights, keep, scope):
    return (for_each_layer if scope == "layer" else for_all_at_once)(weights, keep)


@right("2.5")
def a_list_of_all_weights(weights, keep, scope):
    masks = {n: torch.zeros(w.numel(), dtype=torch.bool) for n, w in weights.items()}
    groups = [list(weights)] if scope == "network" else [[n] for n in weights]
    for group in groups:
        entries = [(-abs(v), n, i) for n in group for i, v in enumerate(weights[n].flatten().tolist())]
        for _, n, i in sorted(entries, key=lambda e: e[0])[: len(entries) - round((1 - keep) * len(entries))]:
            masks[n][i] = True
    return {n: masks[n].reshape(w.shape) for n, w in weights.items()}


@wrong("2.5", "scope layer: every layer keeps its own share: ['fc1']: wrong values")
def signs_in_each_layer(weights, keep, scope):
    return for_all_at_once(weights, keep) if scope == "network" else {n: by_order(w, keep).reshape(w.shape) for n, w in weights.items()}


@wrong("2.5", "the weights of all layers compete")
def always_the_network(weights, keep, scope):
    return for_all_at_once(weights, keep)


@wrong("2.5", "scope network: all weights compete, and no layer is spared: every layer keeps its own share")
def always_the_layer(weights, keep, scope):
    return for_each_layer(weights, keep)


@wrong("2.5", "no layer is spared")
def spares_one_of_each_layer(weights, keep, scope):
    masks = cut_up_by_hand(weights, keep, scope)
    for name, w in weights.items():
        masks[name].view(-1)[w.abs().flatten().argmax()] = True
    return masks


@wrong("2.5", "no layer is spared")
def sizes_relative_to_each_layer(weights, keep, scope):
    scaled = {n: w / w.abs().max() for n, w in weights.items()}
    return cut_up_by_hand(scaled, keep, scope)


@wrong("2.5", "of equal sizes the earlier stays")
def one_threshold(weights, keep, scope):
    if scope == "layer":
        return for_each_layer(weights, keep)
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    bound = flat.sort(descending=True).values[len(flat) - round((1 - keep) * len(flat)) - 1]
    return {n: w.abs() >= bound for n, w in weights.items()}


@wrong("2.5", "of equal sizes the earlier stays")
def layers_by_name(weights, keep, scope):
    return cut_up_by_hand(dict(sorted(weights.items())), keep, scope)


@wrong("2.5", "no layer is spared")
def mean_of_the_thresholds(weights, keep, scope):
    bound = torch.stack([w.abs().flatten().quantile(1 - keep) for w in weights.values()]).mean()
    return for_each_layer(weights, keep) if scope == "layer" else {n: w.abs() > bound for n, w in weights.items()}


@wrong("2.5", "a mask has another shape than its layer")
def masks_left_flat(weights, keep, scope):
    return {n: m.flatten() for n, m in cut_up_by_hand(weights, keep, scope).items()}


# 2.7 snip(weights, batches)


def normalised(scores):
    total = sum(s.sum() for s in scores.values())
    return {n: s / total.clamp(min=1e-300) for n, s in scores.items()}


def summed(batches, name):
    return torch.stack([g[name] for g in batches]).sum(0)


@right("2.7")
def weight_by_weight(weights, batches):
    scores = {}
    for name, w in weights.items():
        flat = [abs(v * sum(float(g[name].flatten()[i]) for g in batches)) for i, v in enumerate(w.flatten().tolist())]
        scores[name] = torch.tensor(flat, dtype=w.dtype).reshape(w.shape)
    total = math.fsum(float(s.sum()) for s in scores.values()) or 1.0
    return {n: s / total for n, s in scores.items()}


@right("2.7")
def in_one_vector(weights, batches):
    flat = torch.cat([(w * summed(batches, n)).flatten() for n, w in weights.items()])
    shares = torch.nn.functional.normalize(flat, p=1, dim=0).abs()
    parts = shares.split([w.numel() for w in weights.values()])
    return {n: p.view_as(w) for (n, w), p in zip(weights.items(), parts)}


@right("2.7")
def of_the_mean_gradient(weights, batches):  # the number of batches cancels
    return normalised({n: (w * summed(batches, n) / len(batches)).abs() for n, w in weights.items()})


@wrong("2.7", "gradients are summed before the absolute value is taken")
def absolute_value_before_the_sum(weights, batches):
    return normalised({n: sum((w * g[n]).abs() for g in batches) for n, w in weights.items()})


@wrong("2.7", "gradients are summed before the absolute value is taken")
def last_batch_alone(weights, batches):
    return normalised({n: (w * batches[-1][n]).abs() for n, w in weights.items()})


@wrong("2.7", "the gradient alone")
def gradient_alone(weights, batches):
    return normalised({n: summed(batches, n).abs() for n in weights})


@wrong("2.7", "the weight alone")
def weight_alone(weights, batches):
    return normalised({n: w.abs() for n, w in weights.items()})


@wrong("2.7", "squares, not sizes")
def squares(weights, batches):
    return normalised({n: (w * summed(batches, n)) ** 2 for n, w in weights.items()})


@wrong("2.7", "the sign was kept")
def sign_kept(weights, batches):
    return {n: s / s.sum() for n, s in ((n, w * summed(batches, n)) for n, w in weights.items())}


@wrong("2.7", "each layer sums to 1 by itself")
def normalised_layer_by_layer(weights, batches):
    return {n: normalised({n: (w * summed(batches, n)).abs()})[n] for n, w in weights.items()}


@wrong("2.7", "the scores of the whole network sum to 1")
def not_normalised(weights, batches):
    return {n: (w * summed(batches, n)).abs() for n, w in weights.items()}


@wrong("2.7", "a dict with a tensor for each layer is asked for")
def scores_in_a_list(weights, batches):
    return list(normalised(not_normalised(weights, batches)).values())


@wrong("2.7", "the scores have another shape than their weights")
def scores_left_flat(weights, batches):
    return {n: s.flatten() for n, s in normalised(not_normalised(weights, batches)).items()}


@wrong("2.7", "a network without gradient scores 0: ['fc']: not a number")
def nought_by_nought(weights, batches):
    scores = not_normalised(weights, batches)
    total = sum(s.sum() for s in scores.values())
    return {n: s / total for n, s in scores.items()}


# 2.8 choose_keep(accuracy, keeps, allowed)


def choice(accuracy, keeps, least, part="validation"):
    return min((k for k in keeps if accuracy(k, part) >= least), default=1.0)


@right("2.8")
def from_the_smallest_on(accuracy, keeps, allowed):
    dense = accuracy(1.0, "validation")
    for keep in sorted(keeps):
        if dense - accuracy(keep, "validation") <= allowed:
            break
    else:
        keep = 1.0
    return keep, accuracy(keep, "test")


@right("2.8")
def in_a_table(accuracy, keeps, allowed):
    table = np.array([(k, accuracy(k, "validation")) for k in [1.0, *keeps]])
    keep = float(table[table[:, 1] >= table[0, 1] - allowed, 0].min())
    return [keep, accuracy(keep, "test")]


@wrong("2.8", "the test part was asked before the choice was made")
def chosen_on_test(accuracy, keeps, allowed):
    keep = choice(accuracy, keeps, accuracy(1.0, "test") - allowed, "test")
    return keep, accuracy(keep, "test")


@wrong("2.8", "the test part was asked before the choice was made")
def compared_with_the_dense_networks_test(accuracy, keeps, allowed):
    accuracy(1.0, "test")
    return from_the_smallest_on(accuracy, keeps, allowed)


@wrong("2.8", "this is the accuracy on validation")
def reports_validation(accuracy, keeps, allowed):
    keep = choice(accuracy, keeps, accuracy(1.0, "validation") - allowed)
    return keep, accuracy(keep, "validation")


@wrong("2.8", "the first of the list that will do was taken")
def first_of_the_list(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    keep = next((k for k in keeps if accuracy(k, "validation") >= least), 1.0)
    return keep, accuracy(keep, "test")


@wrong("2.8", "the largest was taken")
def largest_that_holds(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    keep = max((k for k in keeps if accuracy(k, "validation") >= least), default=1.0)
    return keep, accuracy(keep, "test")


@wrong("2.8", "allowed is a difference, not a share of the accuracy")
def relative_drop(accuracy, keeps, allowed):
    keep = choice(accuracy, keeps, accuracy(1.0, "validation") * (1 - allowed))
    return keep, accuracy(keep, "test")


@wrong("2.8", "the bound itself was left out")
def strictly_above(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    keep = min((k for k in keeps if accuracy(k, "validation") > least), default=1.0)
    return keep, accuracy(keep, "test")


@wrong("2.8", "where no keep holds, the dense network: raised ValueError")
def minimum_of_nothing(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    keep = min(k for k in keeps if accuracy(k, "validation") >= least)
    return keep, accuracy(keep, "test")


@wrong("2.8", "where no keep holds, the dense network: wrong value")
def largest_keep_at_least(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    keep = min((k for k in keeps if accuracy(k, "validation") >= least), default=max(keeps))
    return keep, accuracy(keep, "test")


@wrong("2.8", "two values are asked for: keep and accuracy")
def keep_alone(accuracy, keeps, allowed):
    return choice(accuracy, keeps, accuracy(1.0, "validation") - allowed)


@wrong("2.8", "the search stopped at the first keep that fails")
def stops_at_the_first_failure(accuracy, keeps, allowed):
    least = accuracy(1.0, "validation") - allowed
    held = itertools.takewhile(lambda k: accuracy(k, "validation") >= least, sorted(keeps, reverse=True))
    keep = min(held, default=1.0)
    return keep, accuracy(keep, "test")


# 2.10 regrow(w, mask, grad, fraction)


def moved(mask, drop, grow, down, up):
    """The flat mask without the ``down`` lowest of ``drop`` and then with the ``up`` highest of ``grow``, among what may go and may come."""
    new = mask.flatten().clone()
    new[drop.flatten().masked_fill(~new, torch.inf).argsort()[:down]] = False
    new[grow.flatten().masked_fill(new, -torch.inf).argsort(descending=True)[:up]] = True
    return new.reshape(mask.shape)


def share(mask, fraction):
    return round(fraction * int(mask.sum()))


@right("2.10")
def with_sets(w, mask, grad, fraction):
    size, pull, kept = w.abs().flatten().tolist(), grad.abs().flatten().tolist(), set(mask.flatten().nonzero().flatten().tolist())
    count = round(fraction * len(kept))
    kept -= set(sorted(kept, key=size.__getitem__)[:count])
    empty = set(range(w.numel())) - kept
    kept |= set(sorted(empty, key=lambda i: -pull[i])[:count])
    return torch.tensor([i in kept for i in range(w.numel())]).reshape(w.shape)


@right("2.10")
def topk_of_what_stays(w, mask, grad, fraction):
    count, kept = share(mask, fraction), int(mask.sum())
    new = torch.zeros(w.numel(), dtype=torch.bool)
    new[torch.where(mask, w.abs(), -1.0).flatten().topk(kept - count).indices] = True
    new[torch.where(new.view_as(w), -1.0, grad.abs()).flatten().topk(count).indices] = True
    return new.view_as(w)


@wrong("2.10", "the sign of the weights was not dropped")
def signed_weights(w, mask, grad, fraction):
    return moved(mask, w, grad.abs(), share(mask, fraction), share(mask, fraction))


@wrong("2.10", "the empty places of the largest |gradient| are grown")
def signed_gradients(w, mask, grad, fraction):
    return moved(mask, w.abs(), grad, share(mask, fraction), share(mask, fraction))


@wrong("2.10", "the largest were dropped")
def largest_dropped(w, mask, grad, fraction):
    return moved(mask, -w.abs(), grad.abs(), share(mask, fraction), share(mask, fraction))


@wrong("2.10", "the empty places of the largest |gradient| are grown")
def smallest_gradients(w, mask, grad, fraction):
    return moved(mask, w.abs(), -grad.abs(), share(mask, fraction), share(mask, fraction))


@wrong("2.10", "the smallest of the kept weights are dropped, round(fraction m) of them")
def removed_ones_count_as_smallest(w, mask, grad, fraction):
    new = mask.flatten().clone()
    new[w.abs().flatten().argsort()[: share(mask, fraction)]] = False
    return moved(new.reshape(mask.shape), w, grad.abs(), 0, share(mask, fraction))


@wrong("2.10", "round(fraction m) of them")
def rounded_down(w, mask, grad, fraction):
    count = int(fraction * int(mask.sum()))
    return moved(mask, w.abs(), grad.abs(), count, count)


@wrong("2.10", "as many weights are kept after as before")
def grows_a_share_of_the_empty(w, mask, grad, fraction):
    return moved(mask, w.abs(), grad.abs(), share(mask, fraction), share(~mask, fraction))


@wrong("2.10", "what was just dropped may come back")
def dropped_ones_are_out(w, mask, grad, fraction):
    shut = grad.abs().masked_fill(mask, -1.0)
    return moved(mask, w.abs(), shut, share(mask, fraction), share(mask, fraction))


@wrong("2.10", "the mask has another shape")
def regrown_and_flat(w, mask, grad, fraction):
    return moved(mask, w.abs(), grad.abs(), share(mask, fraction), share(mask, fraction)).flatten()


@wrong("2.10", "as many weights are kept after as before")
def nothing_grown(w, mask, grad, fraction):
    return moved(mask, w.abs(), grad.abs(), share(mask, fraction), 0)


# 2.11 relative_bytes(mask, width)


def gaps_of(mask):
    places = [-1, *mask.flatten().nonzero().flatten().tolist()]
    return [b - a - 1 for a, b in itertools.pairwise(places)]


def least(gaps, width, fillers=lambda gap, k: gap >> k, size=lambda kept, more, width, k: (kept + more) * width + -(-(kept + more) * k // 8)):
    return min(size(len(gaps), sum(fillers(g, k) for g in gaps), width, k) for k in range(1, 17))


@right("2.11")
def entries_really_written(mask, width):
    sizes = []
    for k in range(1, 17):
        entries = []
        for gap in gaps_of(mask):
            entries += [2**k - 1] * (gap // 2**k) + [gap % 2**k]
        bits = "".join(format(gap, f"0{k}b") for gap in entries)
        sizes.append(len(entries) * width + math.ceil(len(bits) / 8))
    return min(sizes)


@right("2.11")
def with_numpys_bincount(mask, width):
    places = np.flatnonzero(mask.numpy())
    lengths = np.bincount(np.diff(places, prepend=-1) - 1) if len(places) else np.zeros(1, int)
    k = np.arange(1, 17)
    entries = len(places) + (lengths[:, None] * (np.arange(len(lengths))[:, None] // 2**k)).sum(0)
    return int((entries * width + np.ceil(entries * k / 8).astype(int)).min())


@right("2.11")
def by_the_kit(mask, width):
    return nbytes(np.flatnonzero(mask.numpy()), tuple(mask.shape), width)["relative"]


@wrong("2.11", "each entry was padded to bytes by itself")
def padded_entry_by_entry(mask, width):
    return least(gaps_of(mask), width, size=lambda kept, more, width, k: (kept + more) * (width + -(-k // 8)))


@wrong("2.11", "the last bits have no byte")
def last_bits_lost(mask, width):
    return least(gaps_of(mask), width, size=lambda kept, more, width, k: (kept + more) * width + (kept + more) * k // 8)


@wrong("2.11", "k was taken for the longest gap, without fillers")
def without_fillers(mask, width):
    gaps = gaps_of(mask)
    k = max(1, max(gaps, default=0).bit_length())
    return len(gaps) * width + -(-len(gaps) * k // 8)


@wrong("2.11", "the fillers' values are missing")
def fillers_without_values(mask, width):
    return least(gaps_of(mask), width, size=lambda kept, more, width, k: kept * width + -(-(kept + more) * k // 8))


@wrong("2.11", "a filler bridges 2^k weights")
def a_filler_bridges_one_less(mask, width):
    return least(gaps_of(mask), width, fillers=lambda gap, k: gap // (2**k - 1))


@wrong("2.11", "the first gap is missing")
def first_gap_missing(mask, width):
    return least([0, *gaps_of(mask)[1:]] if mask.any() else [], width)


@wrong("2.11", "every value was taken for 4 bytes")
def width_ignored(mask, width):
    return least(gaps_of(mask), 4)


@wrong("2.11", "nothing kept, nothing stored: raised")
def fails_on_nothing(mask, width):
    places = mask.flatten().nonzero().flatten()
    gaps = torch.cat([places[0][None], places.diff() - 1])
    return least(gaps.tolist(), width)


@wrong("2.11", "these are bits")
def bits_not_bytes(mask, width):
    return 8 * least(gaps_of(mask), width)


@wrong("2.11", "padded once to whole bytes")
def gaps_of_each_row(mask, width):
    return least([g for row in mask.reshape(len(mask), -1) for g in gaps_of(row)] if mask.dim() > 1 else gaps_of(mask), width)


# 2.12 obs_step(w, hessian, mask)


def surgeon(w, hessian, mask, costs=None, step=None, rise=None):
    """The step, with another cost, step or rise in the place of the surgeon's."""
    there = mask.nonzero().flatten()
    v, h = w[there], hessian[there][:, there]
    inverse = torch.linalg.inv(h)
    own = v**2 / (2 * inverse.diagonal())
    q = int((own if costs is None else costs(v, h, inverse)).argmin())
    move = -v[q] / inverse[q, q] * inverse[:, q]
    move = move if step is None else step(v, h, inverse, q, move)
    delta = torch.zeros_like(w)
    delta[there] = move
    return int(there[q]), delta, float(own[q] if rise is None else rise(v, h, q, own[q]))


@right("2.12")
def each_weight_tried(w, hessian, mask):
    """By the condition itself: for each q, solve for where the others go."""
    there, best = mask.nonzero().flatten().tolist(), (-1, None, math.inf)
    for q in there:
        others = [i for i in there if i != q]
        delta = torch.zeros_like(w)
        delta[q] = -w[q]
        delta[others] = torch.linalg.solve(hessian[others][:, others], hessian[others][:, q] * w[q])
        rise = float(delta @ hessian @ delta) / 2
        best = min(best, (q, delta, rise), key=lambda found: found[2])
    return best


@right("2.12")
def by_a_cholesky_factor(w, hessian, mask):
    there = mask.nonzero().flatten()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[there][:, there]))
    costs = 0.5 * w[there].square() / inverse.diag()
    b = int(torch.argmin(costs))
    delta = torch.zeros_like(w).index_put((there,), -inverse[b] * (w[there[b]] / inverse[b, b]))
    return there[b], delta, costs[b]


@right("2.12")
def with_what_is_gone_cut_loose(w, hessian, mask):
    """A Hessian whose gone weights have no partners inverts part by part."""
    both = mask[:, None] & mask[None]
    inverse = torch.linalg.inv(torch.where(both, hessian, torch.eye(len(w), dtype=w.dtype)))
    costs = (w**2 / (2 * inverse.diagonal())).masked_fill(~mask, torch.inf)
    q = int(costs.argmin())
    return q, -w[q] / inverse[q, q] * inverse[:, q], float(costs[q])


@wrong("2.12", "the diagonal of H decided, as in OBD")
def obd_decides(w, hessian, mask):
    return surgeon(w, hessian, mask, costs=lambda v, h, inverse: v**2 * h.diagonal())


@wrong("2.12", "size decided, as in magnitude pruning")
def size_decides(w, hessian, mask):
    return surgeon(w, hessian, mask, costs=lambda v, h, inverse: v.abs())


@wrong("2.12", "the others do not move")
def nothing_mended(w, hessian, mask):
    return surgeon(w, hessian, mask, step=lambda v, h, inverse, q, move: torch.where(torch.arange(len(v)) == q, move, 0.0))


@wrong("2.12", "the step has the wrong sign")
def wrong_sign(w, hessian, mask):
    return surgeon(w, hessian, mask, step=lambda v, h, inverse, q, move: -move)


@wrong("2.12", "H stands where its inverse belongs")
def column_of_h(w, hessian, mask):
    return surgeon(w, hessian, mask, step=lambda v, h, inverse, q, move: -v[q] / h[q, q] * h[:, q])


@wrong("2.12", "q goes to 0")
def not_divided_by_the_pivot(w, hessian, mask):
    return surgeon(w, hessian, mask, step=lambda v, h, inverse, q, move: move * inverse[q, q])


@wrong("2.12", "the factor 1/2 is missing")
def no_half(w, hessian, mask):
    return surgeon(w, hessian, mask, rise=lambda v, h, q, own: 2 * own)


@wrong("2.12", "this is OBD's rise, nothing mended")
def obds_rise(w, hessian, mask):
    return surgeon(w, hessian, mask, rise=lambda v, h, q, own: h[q, q] * v[q] ** 2 / 2)


@wrong("2.12", "q goes to 0, and all others move to where the loss rises least; what is gone stays gone")
def part_of_the_inverse(w, hessian, mask):
    inverse = torch.linalg.inv(hessian)
    costs = (w**2 / (2 * inverse.diagonal())).masked_fill(~mask, torch.inf)
    q = int(costs.argmin())
    return q, -w[q] / inverse[q, q] * inverse[:, q] * mask, float(costs[q])


@wrong("2.12", "three values are asked for: q, delta and rise")
def without_the_rise(w, hessian, mask):
    return surgeon(w, hessian, mask)[:2]


@wrong("2.12", "q is the index of a weight that is still there")
def gone_weights_are_cheapest(w, hessian, mask):
    return surgeon(w, hessian, torch.ones_like(mask))


# 2.13 compress_net(weights, biases, images)


def zeroed(weights, masks):
    return {n: torch.where(masks[n], w, 0.0) for n, w in weights.items()}


@right("2.13")
def what_each_layer_is_given(weights, biases, images):
    hidden = torch.relu(images @ weights["fc1"].T + biases["fc1"])
    given = (images, hidden, torch.relu(hidden @ weights["fc2"].T + biases["fc2"]))
    return zeroed(weights, for_all_at_once({n: w * x.norm(dim=0) for (n, w), x in zip(weights.items(), given)}, 0.18))


@right("2.13")
def mended_by_the_kit(weights, biases, images):
    layers = [torch.nn.Linear(w.shape[1], w.shape[0]) for w in weights.values()]
    for layer, w, b in zip(layers, weights.values(), biases.values()):
        layer.weight.data, layer.bias.data = w.clone(), b.clone()
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    made = plan(net, "layerwise_obs", data=(images, torch.zeros(len(images), dtype=torch.int64)), keep=0.195)
    return dict(zip(weights, (p.dense() for p in made.values())))


@wrong("2.13", "of the images are right")
def too_much_removed(weights, biases, images):
    return zeroed(weights, for_all_at_once(weights, 0.1))


@wrong("2.13", "in a file of at most 400 kB: the file has")
def nothing_removed(weights, biases, images):
    return weights


@wrong("2.13", "in a file of at most 320 kB: the file has")
def size_in_every_layer(weights, biases, images):
    return zeroed(weights, for_each_layer(weights, 0.3))


@wrong("2.13", "in a file of at most 250 kB: the file has")
def size_across_the_network(weights, biases, images):
    return zeroed(weights, for_all_at_once(weights, 0.26))


@wrong("2.13", "of the images are right")
def places_drawn_at_random(weights, biases, images):
    return zeroed(weights, for_each_layer({n: torch.rand(w.shape) for n, w in weights.items()}, 0.25))


@wrong("2.13", "fc1 has another shape")
def transposed(weights, biases, images):
    return {n: w.T for n, w in zeroed(weights, for_all_at_once(weights, 0.26)).items()}


@wrong("2.13", "fc3 is not finite")
def divided_by_nought(weights, biases, images):
    return zeroed(weights, for_all_at_once(weights, 0.26)) | {"fc3": weights["fc3"] / 0}


@wrong("2.13", "a dict of fc1, fc2 and fc3 is asked for")
def masks_of_some(weights, biases, images):
    return {"fc1": weights["fc1"]}
