import dataclasses
from contextlib import contextmanager

import pytest
import torch
from training_kit import adapt, look_at, make_prior, perturb

from domainstudio.training.methods import build_objective
from domainstudio.training.objective import Objective, Term, look

MODELS = ["pixel_epsilon", "pixel_learned", "pixel_v", "pixel_x0", "pixel_flow", "latent_epsilon", "latent_flow"]
both = pytest.mark.parametrize("adapter", ["full", "lora"])
paired = pytest.mark.parametrize("method", ["studio", "domainstudio"])


@pytest.mark.parametrize(
    ("name", "method", "adapter"),
    [
        (name, method, ("full", "lora")[(i + j) % 2])
        for i, name in enumerate(MODELS)
        for j, method in enumerate(["studio", "domainstudio"])
    ],
)
def test_before_training_source_and_student_agree_and_pairs_cost_nothing(models, name, method, adapter):
    model = models(name)
    adaptation = adapt(model, adapter)
    objective = build_objective(method, model)
    views = look_at(model, adaptation, objective)
    scale = views.pairs.student_image.abs().max().item()
    torch.testing.assert_close(views.pairs.source_image, views.pairs.student_image, rtol=1e-4, atol=1e-5 * scale)
    parts = objective(views)[1]
    assert abs(parts["image"].item()) < 1e-5
    assert abs(parts["hf"].item()) < 1e-5
    perturb(adaptation, 0.5)
    moved = objective(look_at(model, adaptation, objective))[1]
    for term in ("image", "hf"):
        assert moved[term].item() > 10 * abs(parts[term].item()), (term, moved[term], parts[term])


class Spy:
    """An adaptation that notes what its two networks are shown."""

    def __init__(self, adaptation):
        self.adaptation, self.inside, self.student, self.source_saw = adaptation, False, [], []
        self.network = adaptation.network
        self.network.register_forward_pre_hook(self._note)

    def _note(self, _, args):
        (self.source_saw if self.inside else self.student).append(args)

    @contextmanager
    def source(self):
        with self.adaptation.source() as source:
            hook = None if source is self.network else source.register_forward_pre_hook(self._note)
            self.inside = True
            try:
                yield source
            finally:
                self.inside = False
                if hook:
                    hook.remove()


@both
@paired
def test_student_and_source_see_the_same_noised_pictures(models, adapter, method):
    model = models("pixel_v")
    spy = Spy(adapt(model, adapter))
    objective = build_objective(method, model)
    views = look_at(model, spy, objective, num=5)
    ((x_student, t_student, *told),), ((x_source, t_source, *told_source),) = spy.student, spy.source_saw
    assert told == told_source == [None], "unconditional models are told nothing"
    start = 5 if method == "studio" else 0
    assert torch.equal(x_source, x_student[start:])
    assert torch.equal(t_source, t_student[start:])
    assert torch.equal(x_source, views.pairs.x_t)
    assert torch.equal(t_source, views.pairs.t)
    assert torch.equal(x_student[:5], views.training.x_t)


def test_without_pairs_the_source_is_never_asked(models):
    model = models("pixel_epsilon")
    spy = Spy(adapt(model, "full"))
    views = look_at(model, spy, build_objective("finetune", model))
    assert spy.source_saw == []
    assert views.training.source is None
    assert views.pairs is views.training


@pytest.mark.parametrize("name", MODELS)
def test_noising(models, name):
    model = models(name)
    views = look_at(model, adapt(model, "full"), build_objective("studio", model))
    noises = []
    for view in (views.training, views.pairs):
        alpha, sigma = (level.double().view(-1, 1, 1, 1) for level in (view.alpha, view.sigma))
        for given, own in zip(model.schedule.levels(view.t), (view.alpha, view.sigma), strict=True):
            assert torch.equal(given, own)
        noises.append((view.x_t.double() - alpha * view.x0.double()) / sigma)
    assert torch.equal(views.pairs.x0, make_prior(model).x0)
    noise = torch.cat(noises)
    assert len(noise) == 11
    assert abs(noise.mean().item()) < 0.06
    assert noise.std().item() == pytest.approx(1, abs=0.04)
    assert len(noise.flatten(1)[:, 0].unique()) == 11, "every picture has noise of its own"
    assert views.training.t.unique().numel() == 5


def test_views_follow_from_the_generator(models):
    model = models("latent_v")
    adaptation = adapt(model, "full")
    objective = build_objective("studio", model)
    first, again, other = (look_at(model, adaptation, objective, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.training.x_t, again.training.x_t)
    assert torch.equal(first.pairs.student_image, again.pairs.student_image)
    assert not torch.equal(first.training.t, other.training.t)


@paired
def test_latents_can_be_compared_as_pictures(models, method):
    model = models("latent_flow")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    objective = build_objective(method, model, space="pixel")
    views = look_at(model, adaptation, objective)
    plain = look_at(model, adaptation, dataclasses.replace(objective, space="model"))
    for view, latent in ((views.training, plain.training), (views.pairs, plain.pairs)):
        for ours, x0 in ((view.image, latent.x0), (view.student_image, latent.student.x0)):
            assert ours.shape[1:] == (3, 32, 32)
            torch.testing.assert_close(ours, model.codec.decode(x0), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.pairs.student_image, plain.pairs.student.x0)
    torch.testing.assert_close(
        views.pairs.source_image, model.codec.decode(plain.pairs.source_image), rtol=1e-4, atol=1e-5
    )
    assert not views.pairs.source_image.requires_grad
    _, parts = objective(views)
    assert all(value.isfinite() for value in parts.values())
    images = next(term for term in objective.terms if term.name == "image")
    images.loss(views).backward()
    assert adaptation.network.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.codec.vae.parameters())


def test_the_students_gradient_does_not_reach_the_source(models):
    model = models("pixel_epsilon")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    objective = build_objective("domainstudio", model)
    objective(look_at(model, adaptation, objective))[0].backward()
    with adaptation.source() as source:
        assert all(p.grad is None and not p.requires_grad for p in source.parameters())
    assert all(p.grad is not None for p in adaptation.parameters())


def test_dropout_is_the_students_alone(models):
    model = models("pixel_dropout")
    adaptation = adapt(model, "lora")
    adaptation.network.train()
    objective = build_objective("domainstudio", model)
    views = look_at(model, adaptation, objective)
    model.network.eval()
    with torch.no_grad():
        calm = model.estimate(model.network, views.pairs.x_t, views.pairs.t).x0
    assert torch.equal(views.pairs.source_image, calm)
    assert not torch.equal(views.pairs.student_image, calm)


@pytest.mark.parametrize("name", ["pixel_epsilon", "pixel_flow"])
def test_the_weight_of_an_x0_term_is_the_signal_to_noise_ratio_up_to_one(models, name):
    model = models(name)
    view = look_at(model, adapt(model, "full"), build_objective("finetune", model)).training
    t = torch.tensor([0.0, 1, 250, 499, 501, 900, 999]) if name == "pixel_flow" else torch.tensor([0, 1, 250, 500, 999])
    alpha, sigma = model.schedule.levels(t)
    weights = dataclasses.replace(view, alpha=alpha, sigma=sigma).snr_weight
    if name == "pixel_flow":
        expected = [min(1.0, ((1000 - x) / max(x, 1e-30)) ** 2) for x in t.tolist()]
    else:
        products = model.pipeline.scheduler.alphas_cumprod.double()[t]
        expected = [min(1.0, p / (1 - p)) for p in products.tolist()]
    assert weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert weights[0] == 1
    assert 0 < weights[-1] < 1e-3


def test_an_objective_is_the_weighted_sum_of_its_terms():
    terms = (Term("a", 2.0, lambda v: v * 3), Term("b", 0.5, lambda v: v**2))
    x = torch.tensor(4.0, requires_grad=True)
    total, parts = Objective(terms)(x)
    assert total.item() == 2 * 12 + 0.5 * 16
    assert parts == {"a": 12.0, "b": 16.0}
    total.backward()
    assert x.grad == 2 * 3 + 0.5 * 2 * 4
    assert not any(value.requires_grad for value in parts.values())


@both
def test_looking_does_not_change_the_networks_mode(models, adapter):
    model = models("pixel_epsilon")
    adaptation = adapt(model, adapter)
    adaptation.network.train()
    objective = build_objective("studio", model)
    look(model, adaptation, objective, make_prior(model), make_prior(model), torch.Generator().manual_seed(0))
    assert {m.training for m in adaptation.network.modules()} == {True}
