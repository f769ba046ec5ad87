"""What tests of several files do to networks."""

import torch
from torch import nn


def stirred(model, seed=0, dtype=torch.float32):
    """The model with batch norms that have lived: every number random."""
    draw = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, low in ((m.weight.data, 0.5), (m.bias.data, -0.5), (m.running_mean, -0.2), (m.running_var, 0.5)):
                t.copy_(low + torch.rand(t.shape, generator=draw))
    return model.to(dtype).eval()
