"""Exercise 02, pruning weights: the visible checks and hints, and how the open problem's file is measured. Answers are in torch tensors."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np

from .checks import EMPTY, question
from .trial import Trial

BY_HAND = ("2.6", "2.9")
LAYERS = ("fc1", "fc2", "fc3")


@question(
    "2.1",
    "magnitude_mask",
    hints=(
        "Sort first, then count: a threshold cannot tell equal sizes apart.",
        "`w.abs().flatten().argsort(descending=True, stable=True)` lists the indices from the largest down; stable leaves equals in their order.",
        "The last round((1 - keep) * n) of that list go. Slice from n - gone on: with gone = 0, a slice from -gone would take everything.",
    ),
)
def magnitude_mask(t: Trial) -> None:
    w = t.tensor([[0.5, -3.0, 1.0], [-2.0, 0.1, -0.2]])
    with t.part("of six weights at keep = 0.5, the three largest in size stay"):
        t.equal(t.call("magnitude_mask", w, 0.5), [[False, True, True], [True, False, False]])
    with t.part("of four equal weights at keep = 0.5, the first two stay"):
        t.equal(t.call("magnitude_mask", t.tensor([1.0, 1.0, -1.0, 1.0]), 0.5), [True, True, False, False])


@question(
    "2.2",
    "my_bytes",
    hints=(
        "Count the kept weights first, exactly as in 2.1; they cost four bytes each in every format but dense, where all do.",
        "A bitmap has rows x columns bits: an eighth as many bytes, rounded up. In CSR each kept weight has a column beside its value.",
        "csr = kept * (4 + bytes of a column) + (rows + 1) * bytes of a start; the last start is the number kept, so that must fit.",
    ),
    varies={"rows": (100, 120, 200, 256, 300), "columns": (150, 200, 300, 500, 784), "keep": (0.05, 0.08, 0.1, 0.15, 0.2, 0.25)},
)
def my_bytes(t: Trial) -> None:
    with t.part("three whole numbers, for dense, bitmap and csr"):
        found = t.get("my_bytes")
        assert isinstance(found, dict) and set(found) == {"dense", "bitmap", "csr"}, "my_bytes is a dict of dense, bitmap and csr"
        assert all(type(v) is int for v in found.values()), "bytes are whole numbers: int, not float"
    with t.part("the dense bytes of your own layer"):
        assert t.student, EMPTY
        n = t.variant()
        assert t.get("my_bytes")["dense"] == 4 * n["rows"] * n["columns"], f"these are not your numbers, for {t.student!r}: {n}"
    with t.part("pruning pays: csr and bitmap take fewer bytes than dense"):
        found = t.get("my_bytes")
        assert max(found["bitmap"], found["csr"]) < found["dense"]


@question(
    "2.3",
    "sparsity_at",
    hints=(
        "Count the pruning steps that are over at t; only that number enters the formula.",
        "(t - t0) // delta counts them; below 0 nothing has begun, above n everything is over.",
        "With r steps over, the fraction in the formula is r / n: s_f + (s_i - s_f) * (1 - r / n) ** 3.",
    ),
)
def sparsity_at(t: Trial) -> None:
    def at(*steps: int) -> list[Any]:
        return [t.call("sparsity_at", step, 100, 2, 10, 0.0, 0.8) for step in steps]

    with t.part("two pruning steps from 0 to 0.8: 0.7 after the first"):
        t.close(at(100, 110, 120), [0.0, 0.7, 0.8])
    with t.part("between them as before"):
        t.close(at(109, 115), [0.0, 0.7])


@question(
    "2.4",
    "obd_cut",
    hints=(
        "Work out the saliency of every weight first; what goes and what it costs both follow from it.",
        "saliency = hess_diag * w**2 / 2; the `count` lowest go: flatten, argsort, take the first `count`.",
        "rise = the sum of the saliencies of what goes, as one number (`.item()`); the mask is false exactly there, in the shape of w.",
    ),
)
def obd_cut(t: Trial) -> None:
    with t.part("w = (3, 1), h = (0.1, 2): the large weight goes, since the loss hardly bends along it"):
        mask, rise = t.call("obd_cut", t.tensor([3.0, 1.0]), t.tensor([0.1, 2.0]), 1)
        t.equal(mask, [False, True])
    with t.part("and OBD predicts a rise of 0.45"):
        t.close(rise, 0.45)


@question(
    "2.5",
    "network_masks",
    hints=(
        "For the layer scope, 2.1 answers for each layer by itself. For the network scope, what would 2.1 need to be given?",
        "One long vector: torch.cat of all layers, flattened, in the dict's order. Its mask is then to be cut up again.",
        "`mask.split([w.numel() for w in weights.values()])` gives the pieces; reshape each like its layer.",
    ),
)
def network_masks(t: Trial) -> None:
    weights = {"fc1": t.tensor([[1.0, -2.0], [3.0, 4.0]]), "fc2": t.tensor([0.1, -0.2])}
    with t.part("scope layer at keep = 0.5: half of each layer"):
        t.equal(t.call("network_masks", weights, 0.5, "layer"), {"fc1": [[False, False], [True, True]], "fc2": [False, True]})
    with t.part("scope network at keep = 0.5: the three largest of all"):
        t.equal(t.call("network_masks", weights, 0.5, "network"), {"fc1": [[False, True], [True, True]], "fc2": [False, False]})


@question(
    "2.7",
    "snip",
    hints=(
        "Three steps in this order: one gradient for each layer, |w g| for each weight, one division by one number.",
        "Add the batches' gradients layer by layer before any absolute value: what cancels there does not matter to the loss.",
        "The number is the sum over all layers, not over one; where it is 0, return the zeros as they are instead of dividing.",
    ),
)
def snip(t: Trial) -> None:
    w, up, down = t.tensor([[1.0, -2.0]]), t.tensor([[1.0, 3.0]]), t.tensor([[-1.0, 1.0]])
    with t.part("w = (1, -2), gradient (1, 3): scores 1/7 and 6/7"):
        t.close(t.call("snip", {"fc": w}, [{"fc": up}]), {"fc": [[1 / 7, 6 / 7]]})
    with t.part("with a second batch of gradient (-1, 1) the first weight's cancel"):
        t.close(t.call("snip", {"fc": w}, [{"fc": up}, {"fc": down}]), {"fc": [[0.0, 1.0]]})


@question(
    "2.8",
    "choose_keep",
    hints=(
        "Which part may the choice look at? Write the whole choice with that part alone, and only then a last line for the report.",
        "The bound is accuracy(1.0, 'validation') - allowed. Look at every keep; do not stop at the first that fails, for accuracy is noisy.",
        "`min([k for k in keeps if accuracy(k, 'validation') >= bound], default=1.0)`, then one call with 'test'.",
    ),
)
def choose_keep(t: Trial) -> None:
    known = {"validation": {1.0: 0.75, 0.5: 0.625, 0.2: 0.25}, "test": {1.0: 0.5, 0.5: 0.125, 0.2: 0.375}}
    with t.part("dense 0.75, allowed 0.25: of 0.5 (0.625) and 0.2 (0.25) take 0.5, and report its accuracy on test, 0.125, where 0.2 has 0.375"):
        found = t.call("choose_keep", lambda keep, part: known[part][keep], [0.2, 0.5], 0.25)
        t.equal(found, [0.5, 0.125], mistakes={"the choice was made on test": [0.2, 0.375], "this is the accuracy on validation": [0.5, 0.625]})


@question(
    "2.10",
    "regrow",
    hints=(
        "Two rankings: one of the kept weights by |w|, then one of the empty places by |gradient|, and the second comes after the drop.",
        "Give what is no candidate an impossible value: `w.abs().masked_fill(~mask, torch.inf)` has no removed weight among its smallest.",
        "After the drop, `grad.abs().masked_fill(new_mask, -1)`: its largest entries are the places to grow, those just dropped among them.",
    ),
)
def regrow(t: Trial) -> None:
    w, mask = t.tensor([5.0, -1.0, 0.0, 3.0, 0.0, -4.0]), t.tensor([True, True, False, True, False, True])
    with t.part("of four kept weights a quarter moves: from -1, the smallest, to the empty place of gradient -9"):
        t.equal(t.call("regrow", w, mask, t.tensor([1.0, 0.0, 2.0, 1.0, -9.0, 1.0]), 0.25), [True, False, False, True, True, True])


@question(
    "2.11",
    "relative_bytes",
    hints=(
        "First the gaps: `mask.flatten().nonzero()` gives the places; gap = place - place before - 1, where the place before the first is -1.",
        "For one k: fillers = sum of gap // 2**k, entries = kept + fillers; every entry has `width` bytes and k bits.",
        "bytes = entries * width + ceil(entries * k / 8), and of k = 1 ... 16 the least; -(-a // 8) rounds up.",
    ),
)
def relative_bytes(t: Trial) -> None:
    mask = t.tensor([False, True, True, False, False, True, False, False, False, True])
    with t.part("gaps 1, 0, 2, 3 in 2 bits, 4 bytes a value: 16 + 1 bytes"):
        t.equal(t.call("relative_bytes", mask, 4), 17)
    with t.part("one weight after 70,000 removed ones: 16 bits and one filler"):
        far = np.zeros(70_001, bool)
        far[-1] = True
        t.equal(t.call("relative_bytes", t.tensor(far), 4), 12)


@question(
    "2.12",
    "obs_step",
    hints=(
        "Cut H down to the rows and columns of what is still there before you invert it: the inverse of a part is no part of the inverse.",
        "With there = mask.nonzero().flatten(), invert hessian[there][:, there]; the costs are w[there]**2 / (2 * inverse.diagonal()).",
        "With b the cheapest of them, q = int(there[b]), and the step among `there` is -w[q] / inverse[b, b] * inverse[:, b]; put it into n zeros.",
    ),
)
def obs_step(t: Trial) -> None:
    w, h = t.tensor([1.0, 2.0]), t.tensor([[2.0, 1.0], [1.0, 1.0]])  # inverse: [[1, -1], [-1, 2]]
    with t.part("H = ((2, 1), (1, 1)), w = (1, 2): weight 0 goes, weight 1 grows by 1, the loss rises by 0.5"):
        t.close(t.call("obs_step", w, h, t.tensor([True, True])), [0, [-1.0, 1.0], 0.5])
    with t.part("with weight 1 gone already, nothing else moves, and the loss rises by 1"):
        t.close(t.call("obs_step", t.tensor([1.0, 0.0]), h, t.tensor([True, False])), [0, [-1.0, 0.0], 1.0])


@question(
    "2.13",
    "compress_net",
    hints=(
        "network_masks is a beginning: which scope, and which keep still has 97 % on validation?",
        "Weights of pixels that are always black do nothing: weigh each by what it is given, |w| times the root mean square of its input.",
        "Mend what stays, as in 2.12, with the second moment of each layer's inputs (`images`, pushed through the layers before) and some damping.",
    ),
)
def compress_net(t: Trial) -> None:
    net, given = subject()
    size = np.inf
    with t.part("97 % are right of every second validation image"):
        size, accuracy = measured(net, t.call("compress_net", *given), "validation", every=2)
        t.figure("bytes", size)
        t.figure("accuracy", accuracy)
        assert accuracy >= 0.97, f"{size:,} bytes, and {accuracy:.2%} right where 97 % were asked for"
    with t.part("the file is smaller than the dense one"):
        whole = sum(w.nbytes for w in given[0].values())
        assert size < whole, f"the dense weights take {whole:,} bytes"


@cache
def _trained() -> Any:
    from ..lab.zoo import load_net

    return load_net("lenet300", "mnist", seed=0)


@cache
def _images() -> Any:
    from ..lab.data import load_data

    return load_data("mnist").train[0][:512].flatten(1) / 255


def subject(rng: np.random.Generator | None = None) -> tuple[Any, tuple]:
    """The open problem's network, and what ``compress_net`` is given of it: weights, biases, 512 images; its hidden units in ``rng``'s order."""
    net = deepcopy(_trained())
    if rng is not None:
        for one, following in (("fc1", "fc2"), ("fc2", "fc3")):
            one, following = net.get_submodule(one), net.get_submodule(following)
            order = rng.permutation(len(one.weight))
            one.weight.data, one.bias.data = one.weight.data[order], one.bias.data[order]
            following.weight.data = following.weight.data[:, order]
    weights, biases = ({n: getattr(net.get_submodule(n), what).detach() for n in LAYERS} for what in ("weight", "bias"))
    return net, (weights, biases, _images())


def measured(net: Any, pruned: dict[str, Any], part: str, every: int = 1) -> tuple[int, float]:
    """(bytes of the file with these weights, share of right answers on every so many images of a part of MNIST).

    AssertionError where the weights do not fit the network.
    """
    from ..core.apply import attach_plan
    from ..core.inputs import pair_of
    from ..lab.data import load_data
    from ..lab.files import length
    from ..lab.train import evaluate

    plan = _plan(net, pruned)
    images, labels = pair_of(load_data("mnist"), part)
    return length(net, plan), evaluate(attach_plan(deepcopy(net), plan), (images[::every], labels[::every]), batch=1250)


def _plan(net: Any, pruned: dict[str, Any]) -> dict[str, Any]:
    import torch

    from ..core.packed import Masked

    assert isinstance(pruned, dict) and set(pruned) == set(LAYERS), "a dict of fc1, fc2 and fc3 is asked for"
    plan = {}
    for name in LAYERS:
        w = torch.as_tensor(pruned[name], dtype=torch.float32)
        assert w.shape == net.get_submodule(name).weight.shape, f"{name} has another shape"
        assert torch.isfinite(w).all(), f"{name} is not finite"
        plan[name] = Masked(w, w != 0)
    return plan
