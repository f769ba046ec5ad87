"""Where two methods are said to be one, they are: in every weight and every output, and no longer once the knob leaves its end."""

import pytest
import torch

from cmlib.core.apply import weighted
from cmlib.core.laws import subject
from cmlib.lab.train import predict
from cmlib.lab.verbs import compress
from cmlib.methods.coincide import COINCIDENCES


def made(key, knobs, seed):
    """(all weights end to end, outputs) of the laws' network, compressed."""
    model, data = subject(seed)
    net = compress(model, key, data=data, **knobs)
    return torch.cat([m.weight.detach().flatten() for m in weighted(net.eval()).values()]), predict(net, data[0])


def alike(key, knobs, other, others, seed):
    (w, z), (v, y) = made(key, knobs, seed), made(other, others, seed)
    return torch.allclose(w, v, rtol=1e-9, atol=1e-12) and torch.allclose(z, y, rtol=1e-9, atol=1e-12)


ROWS = pytest.mark.parametrize("row", COINCIDENCES, ids=lambda r: f"{r.key}_is_{r.other}")


@ROWS
def test_they_are_one(row):
    assert all(alike(*row[:4], seed) for seed in range(2)) and row.limit


@ROWS
def test_away_from_the_limit_they_are_two(row):
    if row.away is None:
        pytest.skip("the limit is no knob")
    assert not all(alike(row.key, {**row.knobs, **row.away}, row.other, row.others, seed) for seed in range(5))
