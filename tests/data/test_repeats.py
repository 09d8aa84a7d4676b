from pathlib import Path

import numpy as np
from PIL import Image

from domainstudio.data.repeats import find_repeats, fingerprint


def repeats(**pictures):
    found = find_repeats({Path(name): fingerprint(Image.fromarray(pixels)) for name, pixels in pictures.items()})
    return [(str(later), str(earlier), likeness) for later, earlier, likeness in found]


def test_nothing_and_one(noise):
    assert repeats() == []
    assert repeats(a=noise()) == []


def test_each_repeat_names_the_most_alike_earlier_picture(noise):
    a, b = noise(), noise()
    darker = (b * 0.9).astype(np.uint8)
    assert repeats(a=a, b=b, c=b, d=darker, e=a[:, ::-1]) == [
        ("c", "b", "exact"),
        ("d", "b", "near"),
        ("e", "a", "mirrored"),
    ]


def test_same_pixels_in_another_shape_are_not_the_same_picture():
    assert repeats(a=np.zeros((4, 9, 3), np.uint8), b=np.zeros((9, 4, 3), np.uint8)) == []


def test_different_pictures_are_far_apart(noise):
    assert repeats(**{f"p{index}": noise() for index in range(60)}) == []
