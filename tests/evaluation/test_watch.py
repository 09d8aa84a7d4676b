"""The watch against literal distances, against planted copiers and samplers, and its sentences."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from domainstudio.errors import MissingWeights, UserError
from domainstudio.evaluation import features
from domainstudio.evaluation.watch import PATIENCE, Reading, Watch, choose, is_overfitting, tell

pytestmark = pytest.mark.usefixtures("stubs")


def pictures(num: int, seed: int, shift: float = 0.0) -> Tensor:
    """Coarse noise about a mean."""
    coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.5 + shift
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


TRAINING, SOURCE = pictures(10, 0, 0.4), pictures(16, 1, -0.4)


def read(images: Tensor, step: int = 5) -> Reading:
    return Watch(TRAINING, SOURCE).read(step, images)


def distance(a: Tensor, b: Tensor) -> float:
    """What the stub sees of the difference of two pictures, squared."""
    return sum(((0.3 * (a - b))[:, 4::8, 4::8]).flatten().tolist()[i] ** 2 for i in range(48))


def test_a_reading_is_what_it_says():
    images = pictures(16, 2)
    reading = read(images)
    nearest = [min(min(distance(x, t), distance(x, t.flip(-1))) for t in TRAINING) for x in images]
    apart = [
        min(min(distance(t, u), distance(t, u.flip(-1))) for j, u in enumerate(TRAINING) if j != i)
        for i, t in enumerate(TRAINING)
    ]
    assert reading.closeness == pytest.approx(sum(nearest) / 16 / (sum(apart) / 10), rel=1e-4)
    own = [distance(x, y) for i, x in enumerate(images) for j, y in enumerate(images) if i != j]
    theirs = [distance(x, y) for i, x in enumerate(TRAINING) for j, y in enumerate(TRAINING) if i != j]
    assert reading.diversity == pytest.approx(sum(own) / len(own) / (sum(theirs) / len(theirs)), rel=1e-4)


def test_drift_is_from_the_same_noise():
    moved = SOURCE.clone()
    moved[0] += 0.2
    assert read(SOURCE).drift == pytest.approx(0, abs=1e-7)
    assert read(moved).drift == pytest.approx(distance(moved[0], SOURCE[0]) / len(SOURCE), rel=1e-3)


def test_the_source_is_all_of_the_way_off():
    assert read(SOURCE).style_distance == pytest.approx(1)


def test_the_way_left_follows_pictures_on_their_way():
    """Whatever the rest of a picture is: of the same noise, half of the way is half."""
    target = pictures(16, 1, 0.4)
    halfway = read(SOURCE.lerp(target, 0.5)).style_distance
    assert read(SOURCE.lerp(target, 0.2)).style_distance > halfway + 0.2
    assert halfway == pytest.approx(0.5, abs=0.1)
    assert read(target).style_distance < 0.1


def test_a_small_attribute_arrives_step_by_step():
    """A patch of a sixteenth of the picture, among pictures that differ everywhere."""

    def with_patch(images: Tensor, strength: float) -> Tensor:
        images = images.clone()
        images[:, :, 8:16, 8:16] = torch.lerp(images[:, :, 8:16, 8:16], torch.tensor(-1.0), strength)
        return images

    source = pictures(16, 1)
    watch = Watch(with_patch(pictures(10, 0), 1.0), source)
    left = [watch.read(5, with_patch(source, strength)).style_distance for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert left == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=0.12)


def test_pictures_that_still_look_like_the_source_are_counted():
    arrived = pictures(16, 1, 0.4)
    assert read(SOURCE).unadapted == 1
    assert read(arrived).unadapted == 0
    assert read(torch.cat([SOURCE[:4], arrived[4:]])).unadapted == pytest.approx(0.25)
    assert Watch(pictures(10, 0), pictures(16, 1)).read(5, pictures(16, 2)).unadapted is None  # one domain


def test_new_pictures_of_the_domain_are_where_they_should_be():
    readings = [read(pictures(16, seed, 0.4)) for seed in range(10, 20)]
    assert all(0.8 < reading.closeness < 1.25 for reading in readings)
    assert all(reading.style_distance < 0.1 for reading in readings)
    assert all(reading.score < 0.35 for reading in readings)


def test_a_copier_is_close_and_named():
    copies = TRAINING[[2, 6]].repeat(8, 1, 1, 1)
    reading = read(copies + 0.001 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(0)))
    assert reading.closeness < 0.01
    assert reading.crowded == (3, 7)
    assert reading.score > read(pictures(16, 10, 0.4)).score + 0.5
    assert read(copies.flip(-1)).closeness < 0.01


def at(step: int, closeness: float = 1.0, style_distance: float = 0.1, crowded: tuple[int, ...] = ()) -> Reading:
    return Reading(step, closeness, 1.0, style_distance, 0.2, crowded)


RUN = [at(0, 2.0, 1.0), at(50, 1.2, 0.25), at(100, 0.95, 0.2), at(150, 0.5, 0.15), at(200, 0.3, 0.1, (3, 7))]


@pytest.mark.parametrize(("closeness", "style_distance", "score"), [(0.8, 0.3, 0.3), (0.5, 0.3, 0.5), (1.4, 0.3, 0.4)])
def test_the_score_is_the_worse_of_the_two(closeness, style_distance, score):
    assert at(50, closeness, style_distance).score == pytest.approx(score)


def test_the_best_is_the_lowest_score_after_the_source():
    assert choose(RUN).step == 100
    assert choose([at(50, 1.0, 0.0), at(100, 0.96, 0.0)]).step == 50
    assert choose([at(0, 1.0, 0.0), at(50, 1.3, 0.9)]).step == 50
    assert choose(RUN[:1]) is None


def test_of_those_that_are_level_the_latest_is_taken():
    level = [at(50, 1.02, 0.01), at(75, 1.0, 0.0), at(100, 0.98, 0.0), at(125, 0.94, 0.0)]
    assert choose(level).step == 100
    assert choose(level[:2]).step == 75
    assert choose([*level, at(150, 1.0, 0.5)]).step == 100


@pytest.mark.parametrize(
    ("readings", "told"),
    [
        (RUN, "From step 150 on, outputs collapse onto pictures 3 and 7; step 100 is the best."),
        (RUN[:4], "From step 150 on, outputs collapse onto the training pictures; step 100 is the best."),
        (RUN[:3], "No collapse until step 100; step 100 is the best."),
        (RUN[:2], "No collapse until step 50; step 50 is the best."),
        (
            [RUN[0], at(50, 1.9, 0.9)],
            "The style has not arrived: 90% of the way is left at step 50; take more (max_train_steps).",
        ),
        (
            [*RUN[:2], replace(RUN[2], unadapted=0.25)],
            "25% of the pictures still look like the source's at step 100; take more (max_train_steps).",
        ),
        ([*RUN[:2], replace(RUN[2], unadapted=0.1)], "No collapse until step 100; step 100 is the best."),
        (RUN[:1], "No checkpoint was looked at yet."),
    ],
)
def test_one_sentence(readings, told):
    assert tell(readings) == told


def test_overfitting_is_to_be_past_the_best_and_too_close():
    later = [at(200 + 50 * i, 0.3, 0.1) for i in range(PATIENCE)]
    assert not is_overfitting(RUN[:3])
    assert is_overfitting([*RUN[:3], *later])
    assert not is_overfitting([*RUN[:3], *later[: PATIENCE - 1]])
    assert not is_overfitting([*RUN[:3], *later[:-1], replace(later[-1], closeness=0.9)])


def test_a_reading_survives_json():
    reading = Reading.from_json(RUN[-1].to_json())
    assert reading == RUN[-1]
    assert RUN[-1].to_json()["score"] == pytest.approx(RUN[-1].score)
    assert Reading.from_json(replace(RUN[0], unadapted=0.5).to_json()).unadapted == 0.5
    before = RUN[-1].to_json()
    del before["unadapted"]  # a log that was written before that was read
    assert Reading.from_json(before) == RUN[-1]


@pytest.mark.parametrize(("training", "source"), [(2, 16), (10, 1)])
def test_too_few_pictures_are_refused(training, source):
    with pytest.raises(UserError, match="at least 3 training pictures and 2 samples"):
        Watch(TRAINING[:training], SOURCE[:source])


def test_missing_weights_are_told_at_once(monkeypatch):
    def missing(backbone):
        raise MissingWeights("nowhere")

    monkeypatch.setattr(features, "load_lpips", missing)
    with pytest.raises(MissingWeights):
        Watch(TRAINING, SOURCE)


def test_a_source_that_is_near_already_makes_no_mountain_of_noise():
    near = Watch(TRAINING, pictures(16, 1, 0.38))
    assert all(near.read(5, pictures(16, seed, 0.4)).style_distance < 0.5 for seed in range(10, 20))
    assert near.read(5, TRAINING.repeat(2, 1, 1, 1)[:16]).style_distance == 0
