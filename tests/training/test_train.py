import math
from dataclasses import replace

import pytest
import torch
from tiny_models import KINDS
from training_kit import UNCONDITIONAL, Log, adapt, make_images, make_prior, perturb, run

from domainstudio.errors import UserError
from domainstudio.training import deck
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import build_objective
from domainstudio.training.objective import Objective, Term
from domainstudio.training.train import train

both = pytest.mark.parametrize("adapter", ["full", "lora"])


def source_output(model, adaptation):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *model.sample_shape, generator=generator)
    with adaptation.source() as source:
        return source(x, torch.tensor([5, 700])).sample


def copies(tensors):
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize(
    ("name", "method", "adapter"),
    [
        (name, method, ("full", "lora")[(i + j) % 2])  # every pair of model, method and adapter occurs
        for i, name in enumerate(KINDS)
        for j, method in enumerate(UNCONDITIONAL)
        if method != "ddpm_pa"
    ],
)
def test_everything_trains_through_the_one_loop(models, name, method, adapter):
    model, log = models(name), Log()
    adaptation = adapt(model, adapter)
    before, frozen = copies(adaptation.parameters()), source_output(model, adaptation)
    vae = None if name.startswith("pixel") else copies(model.codec.vae.parameters())
    result = run(model, adaptation, method, steps=2, observers=[log])
    assert log.steps == [0, 1, 2]
    assert all(math.isfinite(value) for metrics in log.metrics for value in metrics.values())
    terms = build_objective(method, model).terms
    for metrics in log.metrics:
        assert set(metrics) == {"loss", "grad_norm", *(term.name for term in terms)}
        assert metrics["loss"] == pytest.approx(sum(t.weight * metrics[t.name] for t in terms), rel=1e-5)
        assert metrics["grad_norm"] > 0
    changed = [not torch.equal(p, q) for p, q in zip(before, adaptation.parameters(), strict=True)]
    assert all(changed)
    assert result.step == 2
    assert torch.equal(source_output(model, adaptation), frozen), "the source stays bit for bit"
    if vae is not None:
        assert all(torch.equal(p, q) for p, q in zip(vae, model.codec.vae.parameters(), strict=True))


@both
def test_pictures_of_latents_can_be_compared_in_pixels(models, adapter):
    model, log = models("latent_v"), Log()
    adaptation = adapt(model, adapter)
    run(model, adaptation, build_objective("studio", model, space="pixel"), observers=[log])
    assert all(math.isfinite(loss) for loss in log.losses)


def losses(models, name="pixel_dropout", adapter="full", method="studio", observers=(), **settings):
    model, log = models(name), Log()
    run(model, adapt(model, adapter), method, steps=3, observers=[log, *observers], **settings)
    return log.losses


@both
@pytest.mark.parametrize("name", ["pixel_dropout", "latent_flow"])
def test_a_seed_fixes_the_losses(models, name, adapter):
    first = losses(models, name, adapter, seed=4, random_flip=True)
    torch.manual_seed(77)
    assert losses(models, name, adapter, seed=4, random_flip=True) == first
    other = losses(models, name, adapter, seed=5, random_flip=True)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_observers_may_draw_numbers_and_sample(models):
    def nosy(event):
        torch.randn(5)
        with event.averaged() as network, torch.no_grad():
            network.eval()
            network(torch.randn(1, 3, 16, 16), torch.tensor([3]))
            network.train()

    assert losses(models, observers=[nosy]) == losses(models)


def test_the_global_generator_is_given_back(models):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    losses(models)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_learns(models):
    """Over fixed pictures and many steps the loss falls well below where it began."""
    model, log = models("pixel_epsilon"), Log()
    run(model, adapt(model, "full"), "finetune", steps=30, observers=[log], learning_rate=5e-3)
    assert sum(log.losses[-5:]) < 0.7 * sum(log.losses[:5])


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(models, adapter, bad):
    model, log = models("pixel_epsilon"), Log()
    adaptation = adapt(model, adapter)
    objective = Objective((Term("bad", bad, lambda v: v.training.student.output.square().mean()),))
    before = copies(adaptation.parameters())
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 1 .*bad.*learning_rate \(now 0.001\)"):
        run(model, adaptation, objective, observers=[log])
    assert log.steps == [0]
    assert all(torch.equal(p, q) for p, q in zip(before, adaptation.parameters(), strict=True))


def test_a_learning_rate_that_is_far_too_high_is_told(models):
    model = models("pixel_epsilon")
    with pytest.raises(UserError, match="lower the learning_rate"):
        run(model, adapt(model, "full"), steps=8, learning_rate=1e30, weight_decay=0.0)


@pytest.mark.parametrize(("method", "prior"), [("studio", False), ("domainstudio", True), ("finetune", True)])
def test_source_samples_are_given_exactly_where_pairs_are_formed_of_them(models, method, prior):
    model = models("pixel_epsilon")
    config = TrainConfig(max_train_steps=1, train_batch_size=3, learning_rate=1e-3)
    samples = make_prior(model) if prior else None
    with pytest.raises(UserError, match="given" if prior else "missing"):
        train(model, adapt(model, "full"), make_images(model), build_objective(method, model), config, samples)


def seen(models, name="pixel_epsilon", steps=6, objective=None, **settings):
    """Clean training pictures and pair pictures of every step."""
    model, batches = models(name), []

    def note(views):
        batches.append((views.training.x0.clone(), views.pairs.x0.clone()))
        return views.training.student.output.square().mean()

    noting = replace(objective or Objective(()), terms=(Term("note", 1.0, note),))
    run(model, adapt(model, "full"), noting, steps=steps, **settings)
    return model, batches


def _matches(batch, pictures):
    """How many rows of `batch` are among `pictures`."""
    return sum(any(torch.allclose(row, picture, atol=1e-5) for picture in pictures) for row in batch)


def test_pictures_are_mirrored_only_on_request(models):
    model, plain = seen(models)
    images = make_images(model)
    assert all(_matches(batch, images) == len(batch) == 4 for batch, _ in plain)
    _, flipped = seen(models, random_flip=True)
    straight = sum(_matches(batch, images) for batch, _ in flipped)
    mirrored = sum(_matches(batch, images.flip(-1)) for batch, _ in flipped)
    assert straight + mirrored == 6 * 4
    mixed = [0 < _matches(batch, images) < 4 for batch, _ in flipped]
    assert any(mixed), "each picture is mirrored or not by itself"
    assert straight >= 4
    assert mirrored >= 4
    for (batch, _), (turned, _) in zip(plain, flipped, strict=True):
        for row, other in zip(batch, turned, strict=True):
            assert torch.equal(row, other) or torch.equal(row.flip(-1), other), "the same pictures in the same order"


def test_pictures_are_mirrored_before_they_are_encoded(models):
    model, batches = seen(models, "latent_epsilon", random_flip=True)
    both_ways = torch.cat([make_images(model), make_images(model).flip(-1)])
    mean, std = model.codec.encode(both_ways).chunk(2, dim=1)
    chosen = []
    for row in torch.cat([batch for batch, _ in batches]):
        surprise = ((row - mean) / std).square().flatten(1).mean(1)
        assert surprise.min() < 1.3, "about 1 for a draw of that picture's posterior"
        chosen.append(int(surprise.argmin()) >= 6)
    assert any(chosen)
    assert not all(chosen)


def test_pairs_are_drawn_anew_from_the_source_samples_each_step(models):
    model, batches = seen(models, objective=build_objective("studio", models("pixel_epsilon")), pair_batch_size=3)
    prior, picks = make_prior(model).x0, set()
    for _, pairs in batches:
        rows = [next(i for i, p in enumerate(prior) if torch.equal(row, p)) for row in pairs]
        assert len(set(rows)) == 3
        picks.add(tuple(rows))
    assert len(picks) > 1


@pytest.mark.parametrize(
    ("nearest", "batch", "expected"),
    [(None, 3, {0, 1, 2, 3, 4, 5}), (6, 3, {0, 1, 2, 3, 4, 5}), (3, 3, {1, 3, 4}), (3, 4, {1, 2, 3, 4})],
)
def test_pairs_are_of_source_samples_nearest_to_the_training_pictures(models, monkeypatch, nearest, batch, expected):
    """At least one batch of them."""
    monkeypatch.setattr(deck, "nearest_first", lambda samples, pictures: torch.tensor([3, 1, 4, 2, 0, 5]))
    objective = build_objective("studio", models("pixel_epsilon"), nearest_class_images=nearest)
    model, batches = seen(models, objective=objective, steps=12, pair_batch_size=batch)
    prior = make_prior(model).x0
    seen_rows = {i for _, pairs in batches for row in pairs for i, p in enumerate(prior) if torch.equal(row, p)}
    assert seen_rows == expected


def test_none_of_the_training_pictures_is_left_out(models):
    with pytest.raises(UserError, match='looks at source samples; use pairing "source_samples"'):
        build_objective("domainstudio", models("pixel_epsilon"), nearest_class_images=3)


def test_studio_shows_the_nearest_hundred_but_to_text_models(models, text_models):
    for model, nearest in ((models("latent_v"), 100), (text_models("sd1_epsilon"), None)):
        assert build_objective("studio", model).nearest == nearest
        assert build_objective("studio", model, nearest_class_images=30).nearest == 30
        assert build_objective("studio", model, pairing="training").nearest is None


@pytest.mark.parametrize(("name", "space"), [("pixel_epsilon", "model"), ("pixel_x0", "model"), ("latent_v", "pixel")])
def test_half_precision_keeps_the_small_pairwise_terms(models, fresh_accelerate, name, space):
    """A KL of cosines is about 1e-3 here; bf16 arithmetic on cosines near 1 is off by more than that."""
    parts = {}
    for mixed in ("no", "bf16"):
        model, log = models(name), Log()
        adaptation = adapt(model, "full")
        perturb(adaptation, 0.1)
        objective = build_objective("domainstudio", model, space=space)
        fresh_accelerate()
        run(model, adaptation, objective, steps=1, observers=[log], mixed_precision=mixed)
        parts[mixed] = log.metrics[0]
    for term in ("simple", "image", "hf", "hfmse"):
        assert parts["bf16"][term] != parts["no"][term], "the network runs in bf16"
        assert parts["bf16"][term] == pytest.approx(parts["no"][term], rel=0.15), term
