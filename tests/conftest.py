"""One thread for every test (two jobs with two threads each slow one another down more than twofold), and the small things tests share."""

import pytest
import torch

from cmlib.lab.data import load_data
from cmlib.lab.zoo import build

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def digits64(digits):
    """The digits' training part as float64 in [0, 1], with labels: for oracles."""
    images, labels = digits.train
    return images.double() / 255, labels


@pytest.fixture
def mlp():
    """The digits MLP, untrained, float64."""
    return build("mlp", "digits").double()
