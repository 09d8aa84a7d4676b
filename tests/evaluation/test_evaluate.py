import json

import pytest
import torch
import torch.nn.functional as F
from stub_networks import Stub
from torch import Tensor, nn

from domainstudio.errors import MissingWeights, UserError
from domainstudio.evaluation import coverage, features, metrics
from domainstudio.evaluation.cache import TensorCache
from domainstudio.evaluation.evaluate import NO_REFERENCE, NO_SOURCE, NUM_SOURCE, Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol


def pictures(num: int, seed: int) -> Tensor:
    return F.interpolate(torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1, (32, 32))


COMPARED = ("kid", "fid", "precision", "recall", "density", "coverage")
"""What compares with the reference pictures, by default."""
ON_REQUEST = ("cmmd", "fd_dino", "clip_image", "clip_text", "unadapted_rate")
TRAINING, REFERENCE, IMAGES = pictures(4, 0), pictures(200, 1), pictures(60, 2)


def plain(evaluation: Evaluation) -> dict:
    """Through JSON, which must neither fail nor hold NaN."""
    return json.loads(json.dumps(evaluation.to_json(), allow_nan=False))


@pytest.mark.usefixtures("stubs")
def test_an_evaluation_is_the_metrics_of_the_features():
    evaluation = Evaluator(TRAINING, REFERENCE).evaluate(IMAGES)
    images, training, reference = (Stub()(x) for x in (IMAGES, TRAINING, REFERENCE))
    table = metrics.pairwise_lpips(images, training)
    either = torch.minimum(table, metrics.pairwise_lpips(images, Stub()(TRAINING.flip(-1))))
    generator = torch.Generator().manual_seed(0)
    assert evaluation.intra_lpips == pytest.approx(
        metrics.intra_lpips_cdc(images, table.argmin(1), 4, generator).value, rel=1e-4
    )
    assert evaluation.nearest_lpips == pytest.approx(float(either.min(1).values.mean()), rel=1e-4)
    assert evaluation.nearest_indices == tuple(either.argmin(1).tolist())
    assert evaluation.nearest_distances == pytest.approx(either.min(1).values.tolist(), rel=1e-3)
    assert evaluation.kid == pytest.approx(1e3 * metrics.kernel_distance(images, reference).value)
    assert evaluation.kid_error == pytest.approx(1e3 * metrics.kernel_distance(images, reference).error)
    assert evaluation.intra_lpips_error > 0
    assert evaluation.fid == pytest.approx(metrics.frechet_distance(images, reference))
    for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5)):
        assert getattr(evaluation, name) == getattr(coverage, name)(images, reference, k)
    assert evaluation.vendi == coverage.vendi_score(images)
    assert (evaluation.num_images, evaluation.num_reference) == (60, 200)
    assert set(evaluation.reasons) == set(ON_REQUEST)
    assert evaluation.notes == ()
    assert evaluation.intra_lpips_protocol == "CDC: LPIPS-VGG at 32 px, 60 images, at most 50 a cluster"
    assert "200 reference pictures: compare only with values measured the same way" in evaluation.fid_protocol
    assert plain(evaluation)["fid"] == evaluation.fid


@pytest.mark.usefixtures("stubs")
def test_crdi_counts_the_clusters_without_a_pair():
    training = torch.cat([TRAINING, -torch.ones(1, 3, 32, 32)])  # nothing is near a black picture
    images = Stub()(IMAGES)
    assignment = metrics.pairwise_lpips(images, Stub()(training)).argmin(1)
    evaluation = Evaluator(training, None, Protocol(intra="crdi", max_per_cluster=10)).evaluate(IMAGES)
    assert evaluation.intra_lpips == pytest.approx(metrics.intra_lpips_crdi(images, assignment, 5, 10).value, rel=1e-4)
    assert evaluation.intra_lpips_protocol.startswith("CRDI")


@pytest.mark.usefixtures("stubs")
def test_a_copier_copies_and_has_no_diversity():
    copier = Evaluator(TRAINING, REFERENCE).copier(num_images=30)
    assert copier.num_images == 30
    assert copier.copy_rate == 1
    assert copier.intra_lpips == pytest.approx(0, abs=1e-5)
    assert copier.nearest_indices[:5] == (0, 1, 2, 3, 0)


@pytest.mark.usefixtures("stubs")
def test_mirrored_training_pictures_are_copies():
    assert Evaluator(TRAINING, REFERENCE).evaluate(TRAINING.flip(-1)).copy_rate == 1


@pytest.mark.usefixtures("stubs")
def test_real_pictures_are_copies_about_as_often_as_the_quantile():
    evaluator = Evaluator(TRAINING, REFERENCE)
    real = evaluator.real()
    assert real.copy_rate == pytest.approx(0.01, abs=0.005)
    assert real.kid is not None
    assert abs(real.kid) < abs(evaluator.copier(100).kid or 0)
    assert "two disjoint random halves (100 and 100)" in real.fid_protocol
    assert evaluator.real() == real


@pytest.mark.usefixtures("stubs")
def test_without_reference_no_kid_and_a_threshold_from_the_spread():
    evaluation = Evaluator(TRAINING, None).evaluate(IMAGES)
    assert evaluation.kid is None
    assert evaluation.fid is None
    assert {name for name, why in evaluation.reasons.items() if why == NO_REFERENCE} == {*COMPARED, "cmmd", "fd_dino"}
    assert evaluation.vendi is not None
    assert evaluation.copy_rate is not None
    assert "among the 4 training pictures" in evaluation.copy_protocol
    plain(evaluation)
    with pytest.raises(UserError, match="--reference-dir"):
        Evaluator(TRAINING, None).real()


@pytest.mark.usefixtures("stubs")
def test_pictures_that_still_look_like_the_source_are_counted():
    source = pictures(NUM_SOURCE + 1, 3) * 0.1 - 0.8
    evaluator = Evaluator(TRAINING, REFERENCE, source=source)
    images = torch.cat([pictures(6, 4) * 0.1 - 0.8, IMAGES[:18]])
    evaluation = evaluator.evaluate(images)
    assert evaluation.unadapted_rate == pytest.approx(0.25)
    assert "from 16 of the source's pictures to the 4 training pictures" in evaluation.unadapted_protocol
    assert evaluator.real().unadapted_rate == evaluator.copier(8).unadapted_rate == 0
    assert Evaluator(TRAINING, REFERENCE, source=source[:NUM_SOURCE]).evaluate(images) == evaluation
    assert plain(evaluation)["unadapted_rate"] == 0.25


@pytest.mark.usefixtures("stubs")
def test_with_a_cache_no_network_is_asked_twice(tmp_path, monkeypatch):
    source, cache = pictures(NUM_SOURCE, 3) * 0.1 - 0.8, TensorCache(tmp_path)
    first = Evaluator(TRAINING, REFERENCE, source=source, cache=cache).evaluate(IMAGES)
    assert first.unadapted_rate is not None
    for name in ("load_lpips", "load_inception"):
        monkeypatch.setattr(features, name, lambda *_: pytest.fail("asked again"))
    assert Evaluator(TRAINING, REFERENCE, source=source, cache=cache).evaluate(IMAGES) == first


@pytest.mark.usefixtures("stubs")
def test_where_that_cannot_be_told_there_is_a_reason():
    source = pictures(8, 3)
    for training, drawn, why in (
        (TRAINING, None, NO_SOURCE),
        (TRAINING, source[:1], NO_SOURCE),
        (TRAINING, source, "too much like the training pictures"),
        (TRAINING[:1], source, "one training picture has no spread"),
    ):
        evaluation = Evaluator(training, REFERENCE, source=drawn).evaluate(IMAGES)
        assert evaluation.unadapted_rate is None
        assert why in evaluation.reasons["unadapted_rate"]
    with pytest.raises(UserError, match="the source pictures range from"):
        Evaluator(TRAINING, None, source=source * 255)


@pytest.mark.usefixtures("stubs")
def test_training_pictures_in_the_reference_are_noted_and_do_not_hide_copies():
    evaluator = Evaluator(TRAINING, torch.cat([REFERENCE[:20], TRAINING]))
    copier = evaluator.copier(8)
    assert copier.copy_rate == 1
    assert copier.copy_threshold == Evaluator(TRAINING, REFERENCE[:20]).copier(8).copy_threshold
    assert copier.notes[0].startswith("4 reference pictures are training pictures")
    only = Evaluator(TRAINING, TRAINING).copier(8)  # nothing honest left: the spread of the training pictures
    assert only.copy_rate == 1
    assert "among the 4 training pictures" in only.copy_protocol


@pytest.mark.usefixtures("stubs")
def test_too_few_pictures_have_reasons():
    single = Evaluator(TRAINING[:1], REFERENCE[:1]).evaluate(IMAGES[:1])
    assert set(single.reasons) == {"intra_lpips", *COMPARED, *ON_REQUEST}
    few = Evaluator(TRAINING, REFERENCE[:4]).evaluate(IMAGES)
    assert set(few.reasons) == {"density", "coverage", *ON_REQUEST}
    assert "60 pictures against 4: this needs at least 6 in each set" in few.reasons["density"]
    lonely = Evaluator(TRAINING[:1], None).evaluate(IMAGES[:2])
    assert "--reference-dir" in lonely.reasons["copy_rate"]
    assert lonely.nearest_lpips is not None
    apart = Evaluator(TRAINING, None).evaluate(TRAINING)  # each its own cluster
    assert "no two images" in apart.reasons["intra_lpips"]
    assert "1 pictures against 2" in Evaluator(TRAINING, REFERENCE[:3]).real().reasons["kid"]
    plain(single), plain(lonely), plain(apart)


def test_missing_weights_are_reasons_not_exceptions(monkeypatch):
    def find_weights(name: str):
        raise MissingWeights(f"no {name} here. Install them with: pip")

    monkeypatch.setattr(features, "find_weights", find_weights)
    evaluation = Evaluator(TRAINING, REFERENCE).evaluate(IMAGES)
    names = {"intra_lpips", "nearest_lpips", "copy_rate", "copy_threshold", "vendi", *COMPARED, *ON_REQUEST}
    assert set(evaluation.reasons) == names
    assert all(getattr(evaluation, name) is None for name in names)
    assert evaluation.reasons["intra_lpips"].startswith("no lpips-vgg here")
    assert evaluation.reasons["fid"].startswith("no inception here")
    assert evaluation.nearest_indices == evaluation.nearest_distances == ()
    plain(evaluation)


@pytest.mark.usefixtures("stubs")
def test_missing_inception_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(features, "load_inception", lambda: features.load_lpips(features.find_weights("gone")))
    monkeypatch.setattr(features, "find_weights", lambda name: (_ for _ in ()).throw(MissingWeights("gone")))
    evaluation = Evaluator(TRAINING, REFERENCE).evaluate(IMAGES)
    assert {name for name, why in evaluation.reasons.items() if why == "gone"} == {*COMPARED, "vendi"}
    assert evaluation.intra_lpips is not None


@pytest.mark.usefixtures("stubs")
def test_each_network_sees_training_and_reference_once(monkeypatch):
    stages = []
    evaluator = Evaluator(TRAINING, REFERENCE, progress=lambda stage, done, total: stages.append(stage))
    evaluator.evaluate(IMAGES)
    first = set(stages)
    stages.clear()
    evaluator.evaluate(IMAGES)
    assert first - set(stages) == {"LPIPS of the reference pictures", "Inception of the reference pictures"}


@pytest.mark.usefixtures("stubs")
def test_memory_stays_with_one_batch_or_one_cluster(monkeypatch):
    sizes, embed = [], features.embed

    def counted(network: nn.Module, images: Tensor, *args, **kwargs) -> Tensor:
        if not kwargs:  # Inception's features are small: all are kept
            sizes.append(len(images))
        return embed(network, images, *args, **kwargs)

    monkeypatch.setattr(features, "embed", counted)
    Evaluator(TRAINING, None, Protocol(lpips_px=64, max_per_cluster=5)).evaluate(IMAGES)
    assert max(sizes) <= 32


def test_the_size_is_that_of_the_training_pictures_within_limits():
    sizes = [Evaluator(torch.zeros(1, 3, px, px), None).protocol.lpips_px for px in (16, 64, 512)]
    assert sizes == [32, 64, 256]
    assert Protocol(lpips="alex", lpips_px=64).describe(500) == (
        "CDC: LPIPS-ALEX at 64 px, 500 images, at most 50 a cluster"
    )
    assert "the pictures' own size" in Protocol().describe(5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(0, 3, 8, 8), "shape"),
        (torch.full((1, 3, 8, 8), 255.0), r"scale them to \[-1, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), "range from nan"),
    ],
)
def test_wrong_pictures_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        Evaluator(images, None)


def test_wrong_protocols_are_refused():
    with pytest.raises(UserError, match="lpips_px=8"):
        Protocol(lpips_px=8)
    with pytest.raises(UserError, match="max_per_cluster=1"):
        Protocol(max_per_cluster=1)
