import pytest
import torch
from torch import Tensor

from domainstudio.data.domain import load_domain
from domainstudio.data.symmetry import SYMMETRIC_BELOW, asymmetry


def pictures(number: int, seed: int = 0) -> Tensor:
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_is_the_literal_ratio_of_mean_distances():
    images = pictures(5)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    apart = sum((images[i] - images[j]).square().sum() for i, j in pairs)
    mirrored = sum((images[i] - images[j].flip(-1)).square().sum() for i, j in pairs)
    assert asymmetry(images) == pytest.approx(float(mirrored / apart) - 1, abs=1e-6)


def test_pictures_with_their_own_mirror_images_may_be_mirrored():
    few = pictures(100)
    assert abs(asymmetry(few)) < 0.01
    assert asymmetry(torch.cat([few, few.flip(-1)])) < 0  # each picture's mirror image is among the others


def test_is_unbiased_in_few_pictures():
    values = [asymmetry(pictures(4, seed)) for seed in range(200)]
    assert abs(sum(values) / len(values)) < 0.01


def test_pictures_that_face_one_way_may_not():
    ramp = torch.linspace(-1, 1, 8).expand(3, 8, 8)
    assert asymmetry(ramp + pictures(10) / 2) > 1
    assert asymmetry(ramp.flip(-1) + pictures(10) / 2) > 1


def test_equal_pictures_are_as_near_as_can_be():
    assert asymmetry(torch.zeros(3, 3, 8, 8)) == 0


@pytest.mark.parametrize(
    ("name", "may"), [("sunglasses", True), ("grey", True), ("watercolour", True), ("ink", False), ("smiles", False)]
)
def test_bundled_domains(name, may):
    assert (asymmetry(load_domain(f"bundled:{name}", 64).images) < SYMMETRIC_BELOW) is may
