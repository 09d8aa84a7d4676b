import copy

import pytest
import torch
from tiny_text import TEXT_KINDS
from training_kit import Log, adapt, look_at, make_images, make_prior, perturb

from domainstudio.diffusion.prediction import to_noise
from domainstudio.diffusion.schedule import over
from domainstudio.errors import UserError
from domainstudio.training.ant import DomainClassifier, hardest_noise
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import ant, build_objective, finetune
from domainstudio.training.train import train

pytest_plugins = "text_kit"
KINDS = ["pixel_epsilon", "pixel_v", "latent_v", "pixel_flow"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_like(num=3):
    return torch.randn(num, 2, 4, 4, generator=generator(), dtype=torch.float64)


def test_the_first_step_is_the_written_out_formula():
    noise, weights = noise_like(), torch.rand(3, 2, 4, 4, generator=generator(1), dtype=torch.float64)
    found = hardest_noise(lambda n: (weights * n).square().sum((1, 2, 3)), noise, steps=1, step_size=0.02)
    moved = noise + 0.02 * 2 * weights.square() * noise
    for own, expected in zip(found, moved, strict=True):
        torch.testing.assert_close(own, (expected - expected.mean()) / expected.std())


def test_noise_gets_harder_and_stays_standard_noise():
    weights = torch.rand(3, 2, 4, 4, generator=generator(1), dtype=torch.float64)

    def error(noise):
        return (weights * noise).square().sum((1, 2, 3))

    noise = noise_like()
    few, many = hardest_noise(error, noise, 2), hardest_noise(error, noise, 10)
    start = hardest_noise(error, noise, 1, step_size=0.0)
    assert (error(start) < error(few)).all()
    assert (error(few) < error(many)).all()
    torch.testing.assert_close(many.mean((1, 2, 3)), torch.zeros(3).double())
    torch.testing.assert_close(many.std((1, 2, 3)), torch.ones(3).double())
    assert torch.equal(hardest_noise(error, noise, 0), noise)


def fitted(model, adaptation, gap):
    """A classifier of dark pictures against bright ones."""
    noise = torch.randn(20, *model.sample_shape, generator=generator(3)) * 0.1
    classifier = DomainClassifier(model)
    return classifier, classifier.fit(adaptation, noise[:10] - gap, noise[10:] + gap, generator())


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("name", ["pixel_epsilon", "latent_v"])
def test_the_gradient_is_that_of_the_probability(models, name, adapter):
    model = models(name)
    adaptation = adapt(model, adapter)
    classifier, right = fitted(model, adaptation, 1.0)
    assert right > 0.75
    assert fitted(model, adaptation, 0.0)[1] < right
    perturb(adaptation)  # the source is asked, whatever the student became
    x_t, t = torch.randn(2, *model.sample_shape, generator=generator(5)), torch.tensor([100, 300])
    gradient = classifier.gradient(x_t, t)
    direction = torch.randn(x_t.shape, generator=generator(6))

    def log_probability(x):
        with adaptation.source() as network:
            return torch.nn.functional.logsigmoid(classifier._logits(network, x, t)).sum().item()

    step = 1e-2
    slope = (log_probability(x_t + step * direction) - log_probability(x_t - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=0.05)
    assert log_probability(x_t + 0.1 * gradient) > log_probability(x_t)
    assert not gradient.requires_grad
    assert all(p.grad is None for p in adaptation.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_the_term_is_the_written_out_formula(models, name):
    model = models(name)
    adaptation = adapt(model, "full")
    perturb(adaptation)
    objective = ant(model, similarity_weight=3.0, adversarial_steps=2)
    view = (views := look_at(model, adaptation, objective)).training
    levels = (view.alpha, view.sigma)
    said = to_noise(model.prediction, view.student.output, view.x_t, *levels)
    noise = (view.x_t - over(view.alpha, view.x0) * view.x0) / over(view.sigma, view.x0)
    torch.testing.assert_close(noise.mean((1, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)  # as hardest_noise leaves it
    pull = over(view.sigma.square(), noise) * objective.classifier.gradient(view.x_t, view.t)
    expected = (said - (noise - 3 * pull)).square().mean()
    torch.testing.assert_close(objective(views)[0], expected, rtol=1e-3, atol=1e-5)


def test_without_both_it_is_plain_fine_tuning_of_epsilon(models):
    model = models("pixel_epsilon")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    plain = ant(model, similarity_weight=0.0, adversarial_steps=0)
    assert not plain.needs_prior
    assert not plain.needs_source
    values = [objective(look_at(model, adaptation, objective))[0] for objective in (plain, finetune(model))]
    torch.testing.assert_close(*values)


def test_adversarial_noise_raises_the_error(models):
    model = models("pixel_epsilon")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    losses = [
        objective(look_at(model, adaptation, objective))[0].item()
        for objective in (ant(model, 0.0, adversarial_steps=steps) for steps in (0, 3, 10))
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(models, adapter):
    states, logs = [], []

    def keep(event):
        if event.step == 1 and not states:
            states.append(copy.deepcopy(event.state()))

    config = TrainConfig(max_train_steps=3, train_batch_size=4, learning_rate=1e-3)
    for resume in (False, True):
        model, log = models("pixel_epsilon"), Log()
        objective = ant(model, adversarial_steps=2)
        student, start = adapt(model, adapter), states[0] if resume else None
        images, prior = make_images(model), make_prior(model)
        train(model, student, images, objective, config, prior, observers=[log, keep], resume=start)
        logs.append(log.losses)
    assert len(logs[0]) == 3
    assert logs[1] == pytest.approx(logs[0][1:], rel=1e-5)


def test_prompts_are_refused(text_models):
    with pytest.raises(UserError, match="ant is for unconditional models"):
        build_objective("ant", text_models(next(iter(TEXT_KINDS))))
