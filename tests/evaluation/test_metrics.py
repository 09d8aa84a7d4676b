import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from domainstudio.evaluation import metrics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(num: int, size: int, seed: int) -> Tensor:
    return random(num, size, seed=seed) @ random(size, size, seed=seed + 100) / size**0.5 + seed


class Features(nn.Module):
    """Lets torchmetrics take features for images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(("num_a", "num_b"), [(50, 40), (5, 6), (50, 5)])  # more, fewer, mixed against 8 features
def test_frechet_distance_is_torchmetrics(num_a, num_b):
    a, b = correlated(num_a, 8, 1), correlated(num_b, 8, 2)
    fid = FrechetInceptionDistance(Features(8), normalize=True, input_img_size=(8, 1, 1)).set_dtype(torch.float64)
    fid.update(a[:, :, None, None], real=True)
    fid.update(b[:, :, None, None], real=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-4)


def test_frechet_distance_closed_forms():
    a = correlated(30, 6, 1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(4 * 6)
    centred = a - a.mean(0)  # scaled by 3: tr(S + 9 S - 2 · 3 S) = 4 tr S
    assert metrics.frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(centred.T.cov().trace()))


def test_frechet_distance_is_symmetric_and_stable_with_two_images():
    a, b = correlated(2, 64, 1), correlated(3, 64, 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kernel_distance_is_torchmetrics():
    a, b = correlated(20, 8, 1), correlated(20, 8, 2)
    expected = float(poly_mmd(a, b))
    assert metrics.kernel_distance(a, b).value == pytest.approx(expected, rel=1e-4)
    kid = KernelInceptionDistance(Features(8), normalize=True, subsets=1, subset_size=20).set_dtype(torch.float64)
    kid.update(a[:, :, None, None], real=True)
    kid.update(b[:, :, None, None], real=False)
    assert metrics.kernel_distance(a, b).value == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_kernel_distance_of_unequal_sets_is_the_literal_sum():
    a, b = random(5, 3, seed=1), random(7, 3, seed=2)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = sum(within_a) / 20 + sum(within_b) / 42 - 2 * sum(between) / 35
    assert metrics.kernel_distance(a, b).value == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    values = [metrics.kernel_distance(random(10, 4, seed=s), random(10, 4, seed=s + 500)).value for s in range(300)]
    assert min(values) < 0 < max(values)
    assert abs(sum(values) / 300) < 3 * float(torch.tensor(values).std()) / 300**0.5


def test_pairwise_lpips_and_nearest():
    a, b = random(4, 9, seed=1), random(3, 9, seed=2)
    table = metrics.pairwise_lpips(a, b)
    torch.testing.assert_close(table, torch.cdist(a, b).square())
    values, indices = metrics.nearest(table)
    assert [float(v) for v in values] == [min(float(d) for d in row) for row in table]
    assert all(table[n, i] == values[n] for n, i in enumerate(indices))


def literal_mean_pair(rows: Tensor) -> float:
    pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    return sum(float((rows[i] - rows[j]).square().sum()) for i, j in pairs) / len(pairs)


# six clusters: 0 has 5 images, 1 has 3, 2 is single, 3 is empty, 4 has 2, 5 is empty
ASSIGNMENT = torch.tensor([0, 1, 0, 4, 0, 1, 2, 0, 4, 1, 0])
EMBEDDINGS = random(11, 7, seed=3)


def clusters() -> list[Tensor]:
    return [EMBEDDINGS[[n for n in range(11) if ASSIGNMENT[n] == cluster]] for cluster in range(6)]


def test_cdc_drops_empty_and_single_clusters():
    expected = [literal_mean_pair(rows) for rows in clusters() if len(rows) > 1]
    value, _ = metrics.intra_lpips_cdc(EMBEDDINGS, ASSIGNMENT, 6, torch.Generator().manual_seed(0))
    assert value == pytest.approx(sum(expected) / 3)


def test_cdc_takes_seeded_random_images_of_large_clusters():
    def value(seed: int) -> float | None:
        generator = torch.Generator().manual_seed(seed)
        zeros = torch.zeros(11, dtype=torch.long)
        return metrics.intra_lpips_cdc(EMBEDDINGS, zeros, 1, generator, max_per_cluster=4).value

    chosen = EMBEDDINGS[torch.randperm(11, generator=torch.Generator().manual_seed(5))[:4]]
    assert value(5) == value(5) == pytest.approx(literal_mean_pair(chosen))
    assert len({value(seed) for seed in range(5)}) == 5


def test_cdc_without_any_pair_has_no_value():
    assert metrics.intra_lpips_cdc(EMBEDDINGS, torch.arange(11), 11, torch.Generator()) is None


def test_crdi_takes_the_first_images_and_counts_empty_and_single_clusters_as_zero():
    expected = [literal_mean_pair(rows[:3]) if len(rows) > 1 else 0.0 for rows in clusters()]
    value, _ = metrics.intra_lpips_crdi(EMBEDDINGS, ASSIGNMENT, 6, max_per_cluster=3)
    assert value == pytest.approx(sum(expected) / 6)


def test_copies_of_a_real_set_are_about_the_quantile():
    real = random(1000).abs()
    threshold = metrics.copy_threshold(real)
    assert metrics.copy_rate(real, threshold) == pytest.approx(0.01, abs=0.001)
    assert metrics.copy_rate(torch.zeros(5), threshold) == 1
    assert metrics.copy_rate(torch.tensor([threshold / 2, threshold, threshold * 2, 9.0]), threshold) == 0.5


def test_spread_threshold_is_half_the_median_neighbour():
    points = torch.tensor([0.0, 1.0, 3.0])  # nearest others: 1, 1, 2
    table = (points[:, None] - points).abs()
    assert metrics.spread_threshold(table) == 0.5
    assert (table.diagonal() == 0).all()  # the table itself is left alone


def test_drift_is_the_mean_distance_of_partners():
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(5, 7, generator=generator)
    assert metrics.drift(source, source) == 0
    adapted = torch.rand(5, 7, generator=generator)
    expected = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in zip(adapted, source, strict=True)) / 5
    assert metrics.drift(adapted, source) == pytest.approx(expected, rel=1e-12)
    assert metrics.drift(adapted.flip(0), source) != pytest.approx(expected, rel=1e-3)


class TestGaussianDistance:
    def test_it_is_the_literal_sum(self):
        a, b = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 7))

        def kernel(x, y):
            return (
                sum(math.exp(-(math.dist(p, q) ** 2) / 200) for p in x.tolist() for q in y.tolist()) / len(x) / len(y)
            )

        expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
        assert metrics.gaussian_distance(a, b) == pytest.approx(expected, rel=1e-6)
        assert metrics.gaussian_distance(b, a) == pytest.approx(expected, rel=1e-6)

    def test_closed_forms(self):
        one, other = torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]])
        assert metrics.gaussian_distance(one, other, sigma=5) == pytest.approx(2 - 2 * math.exp(-0.5))
        assert metrics.gaussian_distance(one, one) == 0


def test_alignment_is_of_all_with_all_and_prompt_alignment_of_partners():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert metrics.alignment(a, b) == pytest.approx((1 + 0.6 + 0 + 0.8) / 4)
    assert metrics.prompt_alignment(a, b) == pytest.approx((1 + 0.8) / 2)
