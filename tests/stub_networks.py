"""A metric network that needs no weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stub(nn.Module):
    """Coarse pixels as features: not mirror-blind, different for different pictures."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1) * self.scale
