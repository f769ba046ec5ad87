"""Bad input, over the whole catalogue: a clear error or the right answer, never a silent wrong one.

Each method is asked for its plan of the laws' small network and its 40 images, of which one thing is not as it should be.
"""

import pytest
import torch
from torch import nn

from cmlib.core import laws
from cmlib.core.channel_evidence import WITHOUT_DATA
from cmlib.core.planner import Planner
from cmlib.methods import catalog

METHODS = [m for m in catalog().values() if not m.no_plan]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)


def weights(method, model=None, x=None, y=None):
    """What the method makes of each layer's weight."""
    net, (images, labels) = laws.subject()
    data = images if x is None else x, labels if y is None else y
    return {n: p.dense().detach() for n, p in Planner(net if model is None else model, method, data=data)().items()}


def reads(method):
    """Whether the method looks at images."""
    return method.reads_inputs or bool(set(method.asks) - {"w", "training", *WITHOUT_DATA})


def same(a, b, rtol=1e-9):
    return a.keys() == b.keys() and all((a[n].double() - b[n].double()).norm() <= rtol * b[n].double().norm() + 1e-12 for n in a)


def with_weight(value):
    model, _ = laws.subject()
    with torch.no_grad():
        model[3].weight[1, 2, 0, 0] = value
    return model


@every_method
def test_weights_that_are_no_numbers_are_refused(method):
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="layer 3 has 1 weights that are NaN or infinite"):
            weights(method, with_weight(value))
    with pytest.raises(ValueError, match="layer 0 is on the meta device and has no numbers"):
        weights(method, laws.subject()[0].to("meta"))
    with pytest.raises(ValueError, match=r"layer 0 is torch.bfloat16, which no file here holds; give model.float\(\)"):
        weights(method, laws.subject()[0].bfloat16())


@every_method
def test_images_and_labels_that_cannot_be_are_refused_or_play_no_part(method):
    _, (x, y) = laws.subject()
    nan, infinite = x.clone(), x.clone()
    nan[3], infinite[3, 0, 2, 2] = torch.nan, torch.inf
    wrong = {
        "must have as many labels as images": (x, y[:-1]), "and some; got 0 images": (x[:0], y[:0]), "a tensor on the meta device": (x.to("meta"), y),
        "images hold numbers that are NaN": (nan, y), "NaN or infinite": (infinite, y), "refuses an image of shape": (x[..., :5], y),
        "out of bounds": (x, y + 1),
    }  # fmt: skip
    good = weights(method)
    for says, (images, labels) in wrong.items():
        try:
            found = weights(method, x=images, y=labels)
        except ValueError as error:
            assert says in str(error)
        else:
            assert says == "out of bounds" or not reads(method), f"{says}: not refused"
            assert same(found, good) or "labels" in method.asks, says  # a classifier of its own takes any classes


@every_method
def test_layout_and_number_type_make_no_difference(method):
    """Weights and images that do not lie in one piece, images of another float type; in half precision the plan is that of the same numbers."""
    model, (x, _) = laws.subject()
    for layer in (model[0], model[3], model[6]):
        layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    assert same(weights(method, model, x.transpose(2, 3).contiguous().transpose(2, 3)), weights(method))
    small = x.float()
    assert same(weights(method, x=small), weights(method, x=small.double()))
    half, images = laws.subject()[0].half(), x.half()
    found = weights(method, half, images)
    assert {w.dtype for w in found.values()} == {torch.float16}
    assert same(found, weights(method, half.float(), images.float()), rtol=0.06)  # here and there a weight halfway goes to the other level


@pytest.mark.filterwarnings("ignore:.* would keep none")
@every_method
def test_one_weight_a_layer_and_one_image_are_enough(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    _, (x, y) = laws.subject()
    for found in (weights(method, model, x[:8, :, :1, :1], y[:8] % 1), weights(method, x=x[:1], y=y[:1])):
        assert found and all(torch.isfinite(w).all() for w in found.values())


@pytest.mark.parametrize("method", [m for m in catalog().values() if m.no_plan], ids=lambda m: m.key)
def test_what_makes_no_plan_says_what_to_do_with_it(method):
    with pytest.raises(ValueError, match=f"{method.key} is a .*{method.key}"):
        weights(method)
