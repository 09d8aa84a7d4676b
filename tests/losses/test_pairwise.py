import itertools
import math

import pytest
import torch

from domainstudio.errors import UserError
from domainstudio.losses.haar import high_frequency
from domainstudio.losses.pairwise import mean_pair_similarity, pair_logits, pairwise_divergence

DIRECTIONS = ("student_source", "source_student")
REDUCTIONS = ("sum", "mean")
OPTIONS = list(itertools.product(DIRECTIONS, REDUCTIONS, (False, True)))


def draw(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num, 2, 3, 3, generator=generator, dtype=torch.float64) + 0.3


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_distribution(pictures, i):
    weights = [math.exp(cosine(pictures[i], pictures[j])) for j in range(len(pictures)) if j != i]
    return [weight / sum(weights) for weight in weights]


def slow_divergence(student, source, direction, reduction, centre):
    if centre:
        student, source = ([picture / picture.norm() for picture in side] for side in (student, source))
        student, source = ([picture - sum(side) / len(side) for picture in side] for side in (student, source))
    if direction == "source_student":
        student, source = source, student
    total, pairs = 0.0, 0
    for i in range(len(student)):
        for p, q in zip(slow_distribution(student, i), slow_distribution(source, i), strict=True):
            total, pairs = total + p * math.log(p / q), pairs + 1
    return total if reduction == "sum" else total / pairs


@pytest.mark.parametrize("num", [3, 4, 7])
@pytest.mark.parametrize(("direction", "reduction", "centre"), OPTIONS)
def test_equals_a_slow_double_loop(num, direction, reduction, centre):
    student, source = draw(num)
    loss = pairwise_divergence(student, source, direction, reduction, centre)
    assert loss.shape == ()
    expected = slow_divergence(list(student), list(source), direction, reduction, centre)
    assert loss.item() == pytest.approx(expected, rel=1e-11)


def test_three_pictures_by_hand():
    """Student (1,0,0), (0,1,0), (1,1,0): cosines 0, c, c with c = 1/sqrt(2); the source's pictures are orthogonal.

    Pictures 1 and 2 give p = (1, e^c) / (1 + e^c) = (0.33024, 0.66976) against (1/2, 1/2), picture 3 gives 0:
    2 (log 2 + 0.33024 log 0.33024 + 0.66976 log 0.66976) one way, -2 log 2 - log 0.33024 - log 0.66976 the other.
    """
    student = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]).double().view(3, 3, 1, 1)
    source = torch.eye(3).double().view(3, 3, 1, 1)
    assert pairwise_divergence(student, source).item() == pytest.approx(0.117600, abs=1e-6)
    assert pairwise_divergence(student, source, "source_student").item() == pytest.approx(0.122479, abs=1e-6)
    assert pairwise_divergence(student, source, reduction="mean").item() == pytest.approx(0.117600 / 6, abs=1e-6)


def test_defaults_are_the_papers():
    student, source = draw(4)
    expected = pairwise_divergence(student, source, "student_source", "sum", False)
    assert torch.equal(pairwise_divergence(student, source), expected)


@pytest.mark.parametrize(("direction", "reduction", "centre"), OPTIONS)
def test_zero_when_equal_and_never_negative(direction, reduction, centre):
    for seed in range(20):
        student, source = draw(3 + seed % 4, seed)
        assert pairwise_divergence(student, student, direction, reduction, centre).item() == 0
        assert pairwise_divergence(student, source, direction, reduction, centre) > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_pictures_are_a_minimum(direction):
    source = draw(4)[0]
    student = source.clone().requires_grad_()
    pairwise_divergence(student, source, direction).backward()
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize(("direction", "reduction"), list(itertools.product(DIRECTIONS, REDUCTIONS)))
def test_each_pictures_scale_has_no_effect(direction, reduction):
    student, source = draw(5)
    scale = torch.tensor([0.01, 0.5, 1, 3, 1000]).double().view(5, 1, 1, 1)
    loss = pairwise_divergence(student, source, direction, reduction)
    torch.testing.assert_close(pairwise_divergence(scale * student, source, direction, reduction), loss)
    torch.testing.assert_close(pairwise_divergence(student, source * scale.flip(0), direction, reduction), loss)


@pytest.mark.parametrize(("direction", "reduction", "centre"), OPTIONS)
def test_the_order_of_the_pictures_has_no_effect(direction, reduction, centre):
    student, source = draw(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = pairwise_divergence(student, source, direction, reduction, centre)
    moved = pairwise_divergence(student[order], source[order], direction, reduction, centre)
    torch.testing.assert_close(moved, loss)
    assert not torch.isclose(pairwise_divergence(student[order], source, direction, reduction, centre), loss)


def test_centring_sees_differences_that_a_common_picture_hides():
    student, source = draw(5)
    common = 100 * source[:1]
    hidden, seen = (pairwise_divergence(student + common, source + common, centre=centre) for centre in (False, True))
    assert seen > 1e-2 * pairwise_divergence(student, source)
    assert seen > 100 * hidden


def test_a_picture_of_another_length_changes_nothing():
    student, source = draw(5)
    longer = student * torch.tensor([1, 1, 1000, 1, 1]).view(-1, *[1] * (student.ndim - 1))
    for centre in (False, True):
        loss = pairwise_divergence(student, source, centre=centre)
        torch.testing.assert_close(pairwise_divergence(longer, source, centre=centre), loss)


@pytest.mark.parametrize(("direction", "reduction", "centre"), OPTIONS)
def test_gradients_match_finite_differences(direction, reduction, centre):
    student, source = (part[:, :1, :2, :2].clone().requires_grad_() for part in draw(4))
    assert torch.autograd.gradcheck(
        lambda s, r: pairwise_divergence(s, r, direction, reduction, centre), (student, source)
    )


def test_a_black_picture_gives_a_finite_gradient():
    student, source = draw(3)
    student[0] = 0
    student.requires_grad_()
    pairwise_divergence(student, source).backward()
    assert student.grad.isfinite().all()


def test_composes_with_the_haar_transform():
    student, source = draw(4)
    loss = pairwise_divergence(high_frequency(student), high_frequency(source))
    bright = pairwise_divergence(high_frequency(student + 5), high_frequency(source))
    torch.testing.assert_close(loss, bright)


@pytest.mark.parametrize("num", [1, 2])
def test_fewer_than_three_pictures_is_an_error_with_its_remedy(num):
    student, source = draw(num)
    with pytest.raises(UserError, match=rf"{num} pictures.*train_batch_size of 3 or more, or .*finetune"):
        pairwise_divergence(student, source)


@pytest.mark.parametrize("num", [2, 3, 6])
def test_pair_logits_are_the_off_diagonal_in_row_order(num):
    x = draw(num)[0]
    rows = [[cosine(x[i], x[j]) for j in range(num) if j != i] for i in range(num)]
    torch.testing.assert_close(pair_logits(x), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-14)


def test_mean_pair_similarity():
    x = draw(4)[0]
    expected = sum(cosine(x[i], x[j]) for i, j in itertools.combinations(range(4), 2)) / 6
    assert mean_pair_similarity(x).item() == pytest.approx(expected, rel=1e-12)
    assert mean_pair_similarity(x[:1].expand(5, -1, -1, -1)).item() == pytest.approx(1, abs=1e-14)
    assert mean_pair_similarity(torch.eye(3).double()).item() == 0
