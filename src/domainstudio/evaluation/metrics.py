"""Metrics as pure functions of features: no networks, no files, no images. Tensors in, numbers out."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from domainstudio.evaluation.halves import SMALLEST, Estimate, error_of, halves, sums_over_pairs
from domainstudio.precision import double


class Rows(Protocol):
    """Embeddings by index: a tensor (N, D), or anything that makes rows when asked, to spare memory."""

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features; FID if they are Inception's.

    With centred features A, B scaled so that A'A and B'B are the covariances, the trace of (A'A B'B)^1/2 is the sum of
    the singular values of A B'. No root of a singular matrix is taken, so fewer images than features is no problem.

    Args:
        a: (N, D), N >= 2.
        b: (M, D), M >= 2.

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6, with unbiased covariances.
    Trap: biased upwards, the more the smaller the sets; compare only values measured with the same numbers of images.
    """
    mean_a, factor_a = _mean_and_factor(double(a))
    mean_b, factor_b = _mean_and_factor(double(b))
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _mean_and_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor F (at most D rows) with F'F = covariance."""
    mean = features.mean(0)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    if len(factor) > factor.shape[1]:  # same F'F and fewer rows
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³; KID if the features are Inception's (reported x 10³).

    Args:
        a: (N, D), N >= 2.
        b: (M, D), M >= 2.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401). Differs from the released code: the whole sets at once, not the
    mean over random subsets; the expectation is the same and the result is deterministic.
    Trap: unbiased, hence negative at times for sets that agree.
    """
    a, b = double(a), double(b)
    within_a, within_b, across = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    value = mean_off_diagonal(within_a) + mean_off_diagonal(within_b) - 2 * float(across.mean())
    if min(across.shape) < SMALLEST:
        return Estimate(value, None)
    own, others = (halves(num).to(across.device) for num in across.shape)
    n, m = (num // 2 for num in across.shape)
    within = sums_over_pairs(within_a, own) / (n * (n - 1)) + sums_over_pairs(within_b, others) / (m * (m - 1))
    return Estimate(value, error_of(within - 2 * (own * (across @ others)).sum(0) / (n * m)))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def mean_off_diagonal(table: Tensor) -> float:
    """Mean of a square table without its diagonal: over pairs of two different things, (N, N) -> a number, N >= 2."""
    n = len(table)
    return float((table.sum() - table.diagonal().sum()) / (n * (n - 1)))


def gaussian_distance(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """Squared MMD with the kernel exp(-‖x - y‖² / 2 sigma²); CMMD if the features are CLIP's (reported x 10³).

    Args:
        a: (N, D), of length 1 for CMMD.
        b: (M, D), likewise.
        sigma: CMMD's is 10.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603), eq. 4, in the biased form of its released code: never negative.
    Trap: being biased, it is above 0 for small sets of one distribution; compare only values with the same N and M.
    """
    a, b = double(a), double(b)

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        return (
            (torch.cdist(x, y).square() / (-2 * sigma**2)).expm1().mean()
        )  # less 1, which cancels: kernels are near 1

    return max(0.0, float(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean cosine, -1 to 1, of every row of `a` with every row of `b`; both (., D) of length 1.

    CLIP-I if `a` are CLIP's features of generated and `b` of training pictures.

    Source: Ruiz et al. 2023 (arXiv 2208.12242), section 4.
    Trap: a copier's is the highest of all.
    """
    return float((double(a) @ double(b).T).mean())


def prompt_alignment(images: Tensor, prompts: Tensor) -> float:
    """Mean cosine, -1 to 1, of each picture with its own prompt; both (N, D) of length 1. CLIP-T of CLIP's features.

    Source: Ruiz et al. 2023 (arXiv 2208.12242), section 4; Hessel et al. 2021 (arXiv 2104.08718).
    Trap: CLIP does not know an identifier such as "sks"; compare only values of the same prompts.
    """
    return float((double(images) * double(prompts)).sum(1).mean())


def pairwise_lpips(a: Tensor, b: Tensor) -> Tensor:
    """(N, D) and (M, D) embeddings of `Lpips` -> (N, M) distances >= 0.

    Source: Zhang et al. 2018 (arXiv 1801.03924), written as a squared Euclidean distance.
    Trap: equal images come out as about 1e-5, not exactly 0 (one matrix product in float32).
    """
    norms_a, norms_b = (torch.linalg.vector_norm(x, dim=1).square() for x in (a, b))
    return (norms_a[:, None] + norms_b - 2 * (a @ b.T)).clamp(min=0)


def drift(adapted: Tensor, source: Tensor) -> float:
    """Mean LPIPS distance between what the adapted model and its source draw of the same prompt and noise.

    0 is no drift: prompts that have nothing to do with the training pictures should give the same pictures as before.

    Args:
        adapted, source: (N, D) LPIPS embeddings, row i of both from the same prompt and noise.

    Source: the word and the idea are PEFT's (image generation comparison), which measures it with DINOv2 features.
    Trap: grows with guidance and fewer denoising steps; compare only values drawn with the same settings.
    """
    return float((double(adapted) - double(source)).square().sum(1).mean())


def nearest(distances: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) distances -> the smallest of every row (N,) and its column (N,)."""
    values, indices = distances.min(dim=1)
    return values, indices


def intra_lpips_cdc(
    embeddings: Rows, assignment: Tensor, num_clusters: int, generator: torch.Generator, max_per_cluster: int = 50
) -> Estimate | None:
    """Intra-LPIPS as CDC measures it: at most `max_per_cluster` random images a cluster, empty clusters dropped.

    A cluster of one image has no pair and is dropped too. None if no cluster has a pair.

    Args:
        embeddings: (N, D) of `Lpips`.
        assignment: (N,) index of the training picture nearest to each image.
        num_clusters: number of training pictures.
        generator: chooses the images.
        max_per_cluster: at least 2.

    Source: Ojha et al. 2021 (arXiv 2104.06820), section 4.
    Trap: dropping hides training pictures that the model never approaches; CRDI's count is lower for the same images. A
    picture and its own mirror image are varied: a model that recites mirrored pictures does not come out at 0.
    """
    chosen = [
        members[torch.randperm(len(members), generator=generator)[:max_per_cluster]]
        for members in _members(assignment, num_clusters)
        if len(members) >= 2
    ]
    if not chosen:
        return None
    values, of_halves = _mean_pairs(embeddings, chosen)
    return Estimate(sum(values) / len(values), error_of(of_halves.nanmean(0)))


def intra_lpips_crdi(embeddings: Rows, assignment: Tensor, num_clusters: int, max_per_cluster: int = 50) -> Estimate:
    """Intra-LPIPS as CRDI and Uni-DAD measure it: the first images of each cluster; empty or single counts 0.

    Arguments as in `intra_lpips_cdc`; deterministic, so no generator.

    Source: the released evaluation of CRDI and Uni-DAD (5,000 images, first 50 to 100 a cluster).
    Trap: not comparable with CDC's value: an unbalanced model is punished here.
    """
    chosen = [members[:max_per_cluster] for members in _members(assignment, num_clusters) if len(members) >= 2]
    if not chosen:
        return Estimate(0.0, None)
    values, of_halves = _mean_pairs(embeddings, chosen)
    return Estimate(sum(values) / num_clusters, error_of(of_halves.nan_to_num(0).sum(0) / num_clusters))


def _members(assignment: Tensor, num_clusters: int) -> Iterator[Tensor]:
    assignment = assignment.cpu()  # indices and their random order do not depend on the device
    return ((assignment == cluster).nonzero().flatten() for cluster in range(num_clusters))


def _mean_pairs(embeddings: Rows, clusters: list[Tensor]) -> tuple[list[float], Tensor]:
    """Mean over the pairs of each cluster, indices (n,), and of what random halves of all pictures have of it,
    (clusters, NUM_HALVES): nan where that is no pair."""
    values, of_halves, sizes = [], [], [len(members) for members in clusters]
    for members, chosen in zip(clusters, halves(sum(sizes)).split(sizes), strict=True):
        found = embeddings[members]
        table = pairwise_lpips(found, found)
        values.append(mean_off_diagonal(table))
        num = chosen.sum(0)
        of_halves.append(sums_over_pairs(table, chosen).cpu() / (num * (num - 1)).where(num > 1, torch.nan))
    return values, torch.stack(of_halves)


def copy_threshold(real_nearest: Tensor, quantile: float = 0.01) -> float:
    """The distance below which only `quantile` of real held-out pictures lie: closer than that is a copy.

    Args:
        real_nearest: (N,) distance of each held-out picture to its nearest training picture.
        quantile: the share of real pictures that will be called copies.

    Trap: with fewer than 1 / quantile pictures it is about their smallest distance; a held-out picture that is also a
    training picture pulls it to 0.
    """
    return float(torch.quantile(double(real_nearest), quantile))


def spread_threshold(train_distances: Tensor) -> float:
    """A threshold without held-out pictures: half the median distance of a training picture to the nearest other one.

    Args:
        train_distances: (N, N) among the training pictures, N >= 2; the diagonal is ignored.

    Trap: a rule of thumb, in no way calibrated; use `copy_threshold` wherever there are held-out pictures.
    """
    others = double(train_distances).clone().fill_diagonal_(float("inf"))
    return float(others.min(dim=1).values.quantile(0.5)) / 2


def copy_rate(nearest_values: Tensor, threshold: float) -> float:
    """Share (0 to 1) of images at most `threshold` away from their nearest training picture."""
    return float(double(nearest_values <= threshold).mean())
