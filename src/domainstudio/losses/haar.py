"""High-frequency components of a one-level Haar transform."""

import torch.nn.functional as F
from torch import Tensor


def high_frequency(x: Tensor) -> Tensor:
    """hf(x) = LH + HL + HH of the orthonormal stride-2 Haar transform, per channel.

    With L = [1, 1] / sqrt(2) and H = [-1, 1] / sqrt(2) the sum of the three bands is one 2x2 kernel,
    ½ [[-1, -1], [-1, 3]].

    Args:
        x: (B, C, H, W), any range; an odd last row or column is left out.

    Returns:
        (B, C, H // 2, W // 2).

    Source: DomainStudio (arXiv 2306.14153), eq. for hf; differs from the released code: one kernel, not four.
    """
    kernel = x.new_tensor([[-0.5, -0.5], [-0.5, 1.5]]).expand(x.shape[1], 1, 2, 2)
    return F.conv2d(x, kernel, stride=2, groups=x.shape[1])
