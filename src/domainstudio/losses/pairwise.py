"""Pairwise similarity: every picture's relation to the others of its batch is to stay as the frozen source sees it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainstudio.errors import UserError

Direction = Literal["student_source", "source_student"]
Reduction = Literal["sum", "mean"]


def pair_logits(x: Tensor) -> Tensor:
    """Cosine similarity of every picture with every other one: (N, ...) -> (N, N - 1), without the diagonal."""
    n = x.shape[0]
    unit = F.normalize(x.flatten(1), dim=1)
    # The diagonal is every (n + 1)-th entry: drop the first, fold the rest into rows of n + 1, drop their last.
    return (unit @ unit.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def pairwise_divergence(
    student: Tensor,
    source: Tensor,
    direction: Direction = "student_source",
    reduction: Reduction = "sum",
    centre: bool = False,
) -> Tensor:
    """sum_i KL(p_i^student || p_i^source), with p_i = softmax over j != i of cos(x_i, x_j), temperature 1; a scalar.

    Args:
        student, source: (N, ...) the same N pictures as the two models see them, N >= 3.
        direction: which distribution the expectation is over; the paper's is "student_source", the released code's
            the other.
        reduction: "sum" over pictures (the paper); "mean" over the N (N - 1) pairs (the released code).
        centre: scale every picture to length 1, then subtract the batch's mean, on each side. Un-centred cosines mostly
            track brightness; unscaled, one estimate at high noise (under epsilon a hundred times as long) is the mean.

    Raises:
        UserError: if N < 3; with one other picture p_i is 1 and the loss is constant.

    Source: DomainStudio (arXiv 2306.14153), L_img; L_hf is the same on `high_frequency` of both sides.
    """
    n = student.shape[0]
    if n < 3:
        raise UserError(
            f"the batch has {n} pictures, but pairwise terms compare each picture with at least two others; "
            "use a train_batch_size of 3 or more, or a method without pairwise terms (finetune)"
        )
    if centre:
        student, source = _centred(student), _centred(source)
    p, q = F.log_softmax(pair_logits(student), 1), F.log_softmax(pair_logits(source), 1)
    if direction == "source_student":
        p, q = q, p
    total = (p.exp() * (p - q)).sum()
    return total if reduction == "sum" else total / (n * (n - 1))


def _centred(x: Tensor) -> Tensor:
    unit = F.normalize(x.flatten(1), dim=1)
    return unit - unit.mean(0, keepdim=True)


def mean_pair_similarity(x: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of (N, ...), N >= 2: 1 when all pictures are the same; a scalar."""
    return torch.mean(pair_logits(x))
