"""What text-to-image models are trained on: who is told what, prior terms, the identifier, and the everyday options."""

import copy
import dataclasses
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from training_kit import Log, adapt, perturb

from domainstudio.data.batches import batch_indices, step_generator
from domainstudio.diffusion.weighting import min_snr_weight
from domainstudio.errors import UserError
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import build_objective, domainstudio, erase_identifier, finetune
from domainstudio.training.objective import Batch, Prompts, look
from domainstudio.training.optimisation import Training
from domainstudio.training.train import train

pytest_plugins = "text_kit"

TARGETS = ["a portrait, xyz style", "a dog, xyz style", "red hair, xyz style"]
SOURCES = ["a portrait", "a dog", "red hair"]
PRIOR_TARGETS = ["a man, xyz style", "a woman, xyz style", "blue hair, xyz style", "the picture, xyz style"]
PRIOR_SOURCES = ["a man", "a woman", "blue hair", "the picture"]

both = pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])
adapters = pytest.mark.parametrize("adapter", ["lora", "full"])


def told(model, targets, sources) -> Prompts:
    return Prompts(model.encode_prompts(targets), model.encode_prompts(sources))


def pictures(model, num=3):
    blocks = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return blocks.repeat_interleave(model.resolution // 4, 2).repeat_interleave(model.resolution // 4, 3)


def source_samples(model) -> Batch:
    x0 = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(2))
    return Batch(x0, told(model, PRIOR_TARGETS, PRIOR_SOURCES))


def see(model, adaptation, objective, prior=True, seed=0, **settings):
    """The views of one batch of three training pictures and four source samples."""
    generator = torch.Generator().manual_seed(seed)
    x0 = model.codec.draw(model.codec.encode(pictures(model)), generator)
    shown = source_samples(model) if prior else None
    return look(model, adaptation, objective, Batch(x0, told(model, TARGETS, SOURCES)), shown, generator, **settings)


def run(model, adaptation, objective, steps=2, observers=(), **settings) -> Training:
    config = {"train_batch_size": 3, "pair_batch_size": 3, "learning_rate": 1e-3, **settings}
    needs_prior = objective.needs_prior or config.get("erase_steps", 0) > 0
    return train(
        model,
        adaptation,
        pictures(model),
        objective,
        TrainConfig(max_train_steps=steps, **config),
        source_samples(model) if needs_prior else None,
        told(model, TARGETS, SOURCES),
        observers,
    )


def noise_of(view):
    return (view.x_t.double() - _over(view.alpha) * view.x0.double()) / _over(view.sigma)


def _over(level):
    return level.double().view(-1, 1, 1, 1)


def gradients(loss, adaptation):
    return torch.autograd.grad(loss, adaptation.parameters(), allow_unused=True)


# Every combination trains, and leaves the source as it was.


@torch.no_grad()
def says(model, network):
    x_t = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(5))
    return model.estimate(network, x_t, torch.tensor([10, 400, 950]), model.encode_prompts(SOURCES)).output


@adapters
@both
@pytest.mark.parametrize("pairing", ["training", "source_samples"])
@pytest.mark.parametrize("space", ["pixel", "crop", "model"])
def test_every_combination_trains_and_leaves_the_source_as_it_was(text_models, adapter, name, pairing, space):
    model = text_models(name)
    before = says(model, model.network)
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    frozen = copy.deepcopy((model.codec.vae.state_dict(), model.condition.text_encoder.state_dict()))
    adaptation, log = adapt(model, adapter), Log()
    run(model, adaptation, domainstudio(model, pairing=pairing, space=space), observers=[log])
    assert [metrics.keys() for metrics in log.metrics] == [
        {"loss", "simple", "image", "hf", "hfmse", "prior", "grad_norm"}
    ] * 2
    assert min(log.metrics[1].values()) > 0
    with adaptation.source() as source:
        assert torch.equal(says(model, source), before)
        kept = {name.replace(".base_layer", ""): tensor for name, tensor in source.state_dict().items()}
        assert all(torch.equal(kept[name], weights[name]) for name in weights)
    adaptation.network.eval()
    assert (says(model, adaptation.network) - before).abs().max() > 1e-4, "the student has learned something"
    for now, then in zip((model.codec.vae, model.condition.text_encoder), frozen, strict=True):
        assert all(torch.equal(tensor, then[name]) for name, tensor in now.state_dict().items())


@adapters
@pytest.mark.parametrize("method", ["studio", "dreambooth"])
def test_the_text_encoder_is_adapted_where_asked(text_models, adapter, method):
    model = text_models().with_text_encoder()
    before = says(model, model.network)
    adaptation = adapt(model, adapter)
    names = [name for name, p in model.network.named_parameters() if p.requires_grad]
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}
    start = [p.detach().clone() for p in adaptation.parameters()]
    run(model, adaptation, build_objective(method, model))
    moved = {
        name.partition(".")[0]
        for name, p, old in zip(names, adaptation.parameters(), start, strict=True)
        if (p - old).abs().max() > 1e-4
    }
    assert moved == {"unet", "text_encoder"}
    with adaptation.source() as source:
        assert torch.equal(says(model, source), before)


# Who is told what.

_ASKED = {  # objective -> what the student is asked, what the source is asked; one pass each
    "finetune": (["target"], []),
    "dreambooth": (["target", "prior source"], []),
    "erase": (["target", "prior target"], ["prior source"]),
    "domainstudio": (["target", "prior source"], ["source"]),
    "domainstudio without prior": (["target"], ["source"]),
    "domainstudio paired": (["target", "prior target", "prior source"], ["prior source"]),
    "domainstudio held to the source": (["target", "prior source"], ["source", "prior source"]),
    "studio": (["target", "prior target"], ["prior source"]),
    "studio kept": (["target", "prior target", "prior source"], ["prior source"]),
    "studio without prior": (["target", "prior target"], ["prior source"]),
}
_SETTINGS = {
    "without prior": {"with_prior_preservation": False},
    "kept": {"with_prior_preservation": True},
    "paired": {"pairing": "source_samples"},
    "held to the source": {"prior_target": "source"},
}


def objective_of(kind, model):
    if kind == "erase":
        return erase_identifier(model)
    method, _, setting = kind.partition(" ")
    return build_objective(method, model, **_SETTINGS.get(setting, {}))


@pytest.mark.parametrize("kind", _ASKED)
def test_student_and_source_are_told_their_prompts_of_the_same_noised_pictures(text_models, monkeypatch, kind):
    model, asked = text_models(), []
    adaptation, objective = adapt(model, "full"), objective_of(kind, text_models())
    forward = UNet2DConditionModel.forward

    def spy(network, x_t, t, prompts):
        asked.append((network is adaptation.network, x_t, t, prompts))
        return forward(network, x_t, t, prompts)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    views = see(model, adaptation, objective, prior=objective.needs_prior)
    known = {"target": TARGETS, "source": SOURCES, "prior target": PRIOR_TARGETS, "prior source": PRIOR_SOURCES}
    of_student, of_source = _ASKED[kind]
    assert [student for student, *_ in asked] == ([False, True] if of_source else [True])
    noised = {}
    for (_, x_t, t, prompts), sets in zip(asked[::-1], (of_student, of_source), strict=False):
        assert torch.equal(prompts, model.encode_prompts([prompt for name in sets for prompt in known[name]]))
        sizes = [len(known[name]) for name in sets]
        for name, pictures, times in zip(sets, x_t.split(sizes), t.split(sizes), strict=True):
            first = noised.setdefault("prior" in name, (pictures, times))
            assert torch.equal(first[0], pictures)
            assert torch.equal(first[1], times)
    assert views.training.x_t is not views.pairs.x_t or "prior target" not in of_student
    assert torch.equal(views.training.x_t, noised[False][0])
    assert torch.equal(views.pairs.x_t, noised["prior target" in of_student][0])
    assert (views.prior is not None) == ("prior source" in of_student)
    if views.prior is not None:
        assert torch.equal(views.prior.x_t, noised[True][0])


@both
def test_each_view_is_the_estimate_for_its_own_prompts(text_models, name):
    model = text_models(name)
    adaptation = adapt(model, "full")
    perturb(adaptation, 0.05)
    views = see(model, adaptation, objective_of("studio kept", model))
    expected = {
        "training": (views.training.student, adaptation.network, views.training, TARGETS),
        "pairs": (views.pairs.student, adaptation.network, views.pairs, PRIOR_TARGETS),
        "prior": (views.prior.student, adaptation.network, views.prior, PRIOR_SOURCES),
        "source of pairs": (views.pairs.source, adaptation._source, views.pairs, PRIOR_SOURCES),
        "source of prior": (views.prior.source, adaptation._source, views.prior, PRIOR_SOURCES),
    }
    for what, (seen, network, view, prompts) in expected.items():
        alone = model.estimate(network, view.x_t, view.t, model.encode_prompts(prompts))
        torch.testing.assert_close(seen.output, alone.output, rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
    assert views.training.source is None


# Prior preservation.


@both
@pytest.mark.parametrize(
    ("kind", "held_to"),
    [
        ("dreambooth", "picture"),
        ("domainstudio", "picture"),
        ("domainstudio paired", "picture"),
        ("domainstudio held to the source", "source"),
        ("studio kept", "source"),
    ],
)
def test_the_prior_term_against_its_formula(text_models, name, kind, held_to):
    """The student with the source prompt, held to what noised the source samples or to what the source says."""
    model = text_models(name)
    adaptation, objective = adapt(model, "full"), objective_of(kind, model)
    perturb(adaptation, 0.05)
    views = see(model, adaptation, objective)
    view, prompts = views.prior, model.encode_prompts(PRIOR_SOURCES)
    with adaptation.source() as source:
        wanted = model.estimate(source, view.x_t, view.t, prompts).output.double()
    if held_to == "picture":
        wanted, noise = noise_of(view), noise_of(view)
        if model.prediction == "v":
            wanted = _over(view.alpha) * noise - _over(view.sigma) * view.x0.double()
    output = model.estimate(adaptation.network, view.x_t, view.t, prompts).output.double()
    expected = (output - wanted).square().mean().item()
    assert objective(views)[1]["prior"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@adapters
@both
def test_an_untrained_student_already_says_what_the_source_says(text_models, adapter, name):
    model = text_models(name)
    objective, adaptation = objective_of("studio kept", model), adapt(model, adapter)
    parts = objective(see(model, adaptation, objective))[1]
    assert parts["prior"] < 1e-10
    assert (
        objective_of("dreambooth", model)(see(model, adaptation, objective_of("dreambooth", model)))[1]["prior"] > 0.1
    )


@both
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_dreambooth_is_finetuning_and_the_prior_term(text_models, name, weight):
    model = text_models(name)
    adaptation, objective = adapt(model, "full"), build_objective("dreambooth", model, prior_loss_weight=weight)
    views = see(model, adaptation, objective)
    total, parts = objective(views)
    plain = finetune(model)(views)[0]
    torch.testing.assert_close(total, plain + weight * parts["prior"], rtol=1e-6, atol=0)
    assert weight * parts["prior"] > 0.01
    assert parts.keys() == {"simple", "prior"}
    assert (objective.needs_prior, objective.needs_source) == (True, False)


@pytest.mark.parametrize("method", ["dreambooth", "domainstudio", "studio"])
def test_prior_preservation_can_be_left_out(text_models, method):
    model = text_models()
    kept, left_out, default = (build_objective(method, model, with_prior_preservation=on) for on in (True, False, None))
    assert default.prior == (left_out if method == "studio" else kept).prior
    names = [term.name for term in left_out.terms]
    assert [term.name for term in kept.terms] == [*names, "prior"]
    assert left_out.prior == "none"
    if method == "dreambooth":
        assert names == [term.name for term in finetune(model).terms]
        assert not left_out.needs_prior
    views = see(model, adapt(model, "full"), left_out, prior=left_out.needs_prior)
    assert views.prior is None
    assert left_out(views)[1].keys() == set(names)


@pytest.mark.parametrize("setting", [{"with_prior_preservation": True}, {"prior_loss_weight": 2.0}])
def test_finetuning_has_no_prior_term(text_models, setting):
    with pytest.raises(UserError, match=f"finetune has no {next(iter(setting))}; remove it"):
        build_objective("finetune", text_models(), **setting)


def test_text_methods_are_refused_for_unconditional_models_and_the_other_way_round(text_models, models):
    with pytest.raises(UserError, match="dreambooth needs a text-to-image model"):
        build_objective("dreambooth", models("pixel_v"))
    for method in ("domainstudio", "studio"):
        with pytest.raises(UserError, match="with_prior_preservation needs a text-to-image model"):
            build_objective(method, models("pixel_v"), with_prior_preservation=True)
    with pytest.raises(UserError, match="erase_steps needs a text-to-image model"):
        erase_identifier(models("pixel_v"))
    with pytest.raises(UserError, match="domainstudio_released is for unconditional models"):
        build_objective("domainstudio_released", text_models())


# The identifier.


@pytest.mark.parametrize(("adapter", "name", "rate"), [("lora", "sd1_epsilon", 3e-3), ("full", "sd2_v", 1e-4)])
def test_erasing_makes_the_target_prompt_mean_what_the_source_prompt_means(text_models, adapter, name, rate):
    model = text_models(name)
    adaptation, log, objective = adapt(model, adapter), Log(), erase_identifier(model)

    @torch.no_grad()
    def distance():
        views = see(model, adaptation, objective, seed=7)
        return (views.pairs.student.output - views.pairs.source.output).square().mean().item()

    start = distance()
    run(model, adaptation, objective, steps=20, observers=[log], pair_batch_size=4, learning_rate=rate, use_ema=False)
    assert distance() < 0.7 * start
    assert sum(log.losses[-5:]) < 0.8 * sum(log.losses[:5])
    assert all(metrics["loss"] == pytest.approx(metrics["erase"]) for metrics in log.metrics)


def test_the_erasing_term_against_its_formula(text_models):
    model = text_models()
    adaptation, objective = adapt(model, "full"), erase_identifier(model)
    perturb(adaptation, 0.05)
    views = see(model, adaptation, objective)
    student = model.estimate(adaptation.network, views.pairs.x_t, views.pairs.t, model.encode_prompts(PRIOR_TARGETS))
    source = model.estimate(adaptation._source, views.pairs.x_t, views.pairs.t, model.encode_prompts(PRIOR_SOURCES))
    expected = (student.output.double() - source.output.double()).square().mean().item()
    assert objective(views)[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["finetune", "studio"])
def test_the_first_steps_erase_and_the_others_learn(text_models, method):
    model, log = text_models(), Log()
    objective = build_objective(method, model)
    run(model, adapt(model, "lora"), objective, steps=5, observers=[log], erase_steps=3)
    erasing, learning = {"loss", "grad_norm", "erase"}, {"loss", "grad_norm"} | {term.name for term in objective.terms}
    assert [metrics.keys() for metrics in log.metrics] == [erasing] * 3 + [learning] * 2


# Noise levels.


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(gamma):
    """Hang et al. 2023: min(SNR, gamma) for x0, / SNR for epsilon, / (SNR + 1) for v."""
    product = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    alpha, sigma, snr = product.sqrt(), (1 - product).sqrt(), product / (1 - product)
    clamped = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    table = {"x0": clamped, "epsilon": clamped / snr, "v": clamped / (snr + 1)}
    for prediction, expected in table.items():
        torch.testing.assert_close(min_snr_weight(prediction, alpha, sigma, gamma), expected, rtol=1e-10, atol=0)
    assert (table["epsilon"] < 1).any()


def test_studio_gives_high_noise_a_tenth(text_models):
    model = text_models()
    views = see(model, adapt(model, "lora"), build_objective("studio", model))
    simple = [
        build_objective("studio", model, **given)(views)[1]["simple"]
        for given in ({}, {"high_noise_weight": 0.1}, {"high_noise_weight": 0.07})
    ]
    assert simple[0] == simple[1] != simple[2]


@both
@pytest.mark.parametrize("method", ["finetune", "dreambooth", "domainstudio"])
def test_snr_gamma_weights_the_denoising_error_alone(text_models, name, method):
    model = text_models(name)
    adaptation, weighted = adapt(model, "full"), build_objective(method, model, snr_gamma=5.0)
    views = see(model, adaptation, weighted)
    view, parts = views.training, weighted(views)[1]
    snr = (view.alpha.double() / view.sigma.double()).square()
    weight = snr.clamp(max=5) / (snr if model.prediction == "epsilon" else snr + 1)
    errors = (view.student.output.double() - view.target.double()).square().flatten(1).mean(1)
    assert parts.pop("simple").item() == pytest.approx((weight * errors).mean().item(), rel=1e-4)
    plain = build_objective(method, model)(views)[1]
    assert all(parts[other] == plain[other] for other in parts)


def test_two_weights_of_noise_levels_are_refused(text_models, models):
    model = text_models()
    told = r"snr_gamma=5 and high_noise_weight=0\.\d+ both weight noise levels; give one of them"
    with pytest.raises(UserError, match=told):
        build_objective("domainstudio", model, snr_gamma=5.0, high_noise_weight=0.5)
    with pytest.raises(UserError, match=told):
        build_objective("studio", models("pixel_epsilon"), snr_gamma=5.0)
    build_objective("studio", models("pixel_epsilon"), snr_gamma=5.0, high_noise_weight=1.0)
    with pytest.raises(UserError, match=r"snr_gamma=5 and high_noise_mean_weight=0\.5 both"):
        build_objective("domainstudio", model, snr_gamma=5.0, high_noise_mean_weight=0.5)


def test_noise_offset_adds_one_constant_to_each_channel(text_models):
    model = text_models()
    adaptation, objective = adapt(model, "lora"), finetune(model)
    batch = Batch(torch.randn(200, *model.sample_shape), Prompts(model.encode_prompts(["a dog"] * 200)))

    def noised(offset):
        return look(model, adaptation, objective, batch, None, torch.Generator().manual_seed(0), offset).training

    plain, moved = noised(0.0), noised(0.3)
    assert torch.equal(plain.t, moved.t)
    added = noise_of(moved) - noise_of(plain)
    constants = added.mean((2, 3), keepdim=True)
    torch.testing.assert_close(added, constants.expand_as(added), rtol=0, atol=1e-4)
    assert constants.std().item() == pytest.approx(0.3, rel=0.1)  # of 800: 0.3 ± 0.008
    assert abs(constants.mean().item()) < 0.04
    assert constants.flatten(1).std(1).mean() > 0.2, "each channel of a picture has its own"
    torch.testing.assert_close(moved.target.double(), noise_of(moved), rtol=0, atol=1e-4)
    assert noise_of(moved).var().item() == pytest.approx(1 + 0.3**2, rel=0.05)


def test_noise_offset_reaches_the_training(text_models):
    losses = []
    for offset in (0.0, 0.0, 0.5):
        model, log = text_models(), Log()
        run(model, adapt(model, "lora"), finetune(model), steps=1, observers=[log], noise_offset=offset)
        losses += log.losses
    assert losses[0] == losses[1] != losses[2]


# The everyday options.


def test_accumulated_gradients_are_the_mean_of_the_batches(text_models, monkeypatch):
    """Pairs are formed within each batch of three, of which two make a step over all six pictures."""
    model, accumulated, log = text_models(), [], Log()
    adaptation, objective = adapt(model, "lora"), domainstudio(model, space="model")
    perturb(adaptation)
    six, own = pictures(model, 6), (told(model, TARGETS * 2, SOURCES * 2), source_samples(model))
    by_hand, losses = [], []
    encoded, generator = model.codec.encode(six), step_generator(3, 0)
    adaptation.network.train()
    for part in range(2):
        rows = batch_indices(6, 3, 3, part)
        batch = Batch(model.codec.draw(encoded[rows], generator), own[0][rows])
        chosen = torch.randperm(4, generator=generator)[:3]
        shown = Batch(own[1].x0[chosen], own[1].prompts[chosen])
        loss, _ = objective(look(model, adaptation, objective, batch, shown, generator))
        by_hand.append(gradients(loss, adaptation))
        losses.append(loss.item())
    update = Training.update

    def note(self):
        accumulated.extend(p.grad.clone() for p in self.parameters)
        return update(self)

    monkeypatch.setattr(Training, "update", note)
    settings = {"train_batch_size": 3, "pair_batch_size": 3, "learning_rate": 1e-3, "seed": 3}
    config = TrainConfig(max_train_steps=1, gradient_accumulation_steps=2, **settings)
    train(model, adaptation, six, objective, config, own[1], own[0], [log])
    for ours, one, two in zip(accumulated, *by_hand, strict=True):
        torch.testing.assert_close(ours, (one + two) / 2, rtol=1e-4, atol=1e-7)
    assert log.losses == pytest.approx([sum(losses) / 2], rel=1e-5)
    assert losses[0] != losses[1]


def test_accumulation_of_batches_is_no_larger_batch(text_models):
    """Else a pairwise term would compare more pictures: with batches of two it has none to compare."""
    model = text_models()
    objective = domainstudio(model, space="model", with_prior_preservation=False)
    with pytest.raises(UserError, match="the batch has 2 pictures"):
        run(model, adapt(model, "lora"), objective, train_batch_size=2, gradient_accumulation_steps=3)


@adapters
@pytest.mark.parametrize("with_text_encoder", [False, True])
def test_gradient_checkpointing_changes_memory_and_not_gradients(text_models, adapter, with_text_encoder):
    found, passes = [], []
    for checkpointing in (False, True):
        model = text_models()
        if with_text_encoder:
            model = model.with_text_encoder()
        if checkpointing:
            model.checkpoint_gradients()
        adaptation, objective = adapt(model, adapter), build_objective("studio", model, space="pixel")
        perturb(adaptation)
        adaptation.network.train()
        counted = {"unet": 0, "vae": 0, "text_encoder": 0}

        def count(part, module, counted=counted):
            def add(*_):
                counted[part] += torch.is_grad_enabled()

            module.register_forward_pre_hook(add)

        count("unet", model.pipeline.unet.down_blocks[0].resnets[0])
        count("vae", model.codec.vae.decoder.mid_block)
        count("text_encoder", model.pipeline.text_encoder.encoder.layers[0].self_attn)
        loss, _ = objective(see(model, adaptation, objective))
        found.append(gradients(loss, adaptation))
        passes.append(counted)
    assert passes[1]["unet"] == 2 * passes[0]["unet"] > 0
    assert passes[1]["vae"] > passes[0]["vae"] > 0
    if with_text_encoder:
        assert passes[1]["text_encoder"] == 2 * passes[0]["text_encoder"] > 0
    for kept, computed_again in zip(*found, strict=True):
        if kept is None:
            assert computed_again is None
        else:
            torch.testing.assert_close(computed_again, kept, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("pairing", ["training", "source_samples"])
def test_image_terms_in_a_crop_decode_the_same_part_of_everything(text_models, name, pairing):
    model = text_models(name)
    adaptation, objective = adapt(model, "full"), domainstudio(model, pairing=pairing, space="crop")
    perturb(adaptation)
    windows = set()
    for seed in range(4):
        views = see(model, adaptation, objective, seed=seed)
        places = [(i, j) for i in range(5) for j in range(5)]

        def cut(x, place):
            return model.codec.decode(x[..., place[0] : place[0] + 4, place[1] : place[1] + 4])

        (window,) = [place for place in places if torch.equal(views.training.image, cut(views.training.x0, place))]
        for view in (views.training, views.pairs, views.prior):
            assert torch.equal(view.student_image, cut(view.student.x0, window))
        assert torch.equal(views.pairs.source_image, cut(views.pairs.source.x0, window))
        assert views.pairs.source_image.shape[1:] == (3, 8, 8)
        windows.add(window)
    assert len(windows) > 2


def test_image_terms_in_pixels_decode_with_the_scale_undone(text_models):
    model = text_models()
    adaptation, objective = adapt(model, "full"), domainstudio(model)
    assert objective.space == "pixel", "as the paper has it"
    view = see(model, adaptation, objective).training
    assert torch.equal(view.student_image, model.codec.vae.decode(view.student.x0 / 0.18215).sample)
    assert torch.equal(view.image, model.codec.vae.decode(view.x0 / 0.18215).sample)


OPTIMIZERS = {"adamw8bit": ("bitsandbytes", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_that_is_not_installed_names_the_extra(text_models, monkeypatch, optimizer):
    package = OPTIMIZERS[optimizer][0]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    model = text_models()
    with pytest.raises(UserError, match=rf"{optimizer} needs the package {package}.*'domainstudio\[optimizers\]'"):
        run(model, adapt(model, "lora"), finetune(model), optimizer=optimizer)
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert any(needed.startswith(package) for needed in extras["optimizers"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_of_the_extra_is_given_the_settings(text_models, monkeypatch, optimizer):
    given = {}

    class Fake(torch.optim.SGD):
        def __init__(self, parameters, **settings):
            given.update(settings)
            super().__init__(parameters, lr=settings["lr"])

    package, name = OPTIMIZERS[optimizer]
    fake = SimpleNamespace(**{name: Fake})
    monkeypatch.setitem(sys.modules, package, fake)
    monkeypatch.setitem(sys.modules, f"{package}.optim", fake)
    model = text_models()
    run(model, adapt(model, "lora"), finetune(model), optimizer=optimizer, learning_rate=0.5, weight_decay=0.25)
    assert (given["lr"], given["weight_decay"]) == (0.5, 0.25)


def test_prompts_follow_their_pictures(text_models, monkeypatch):
    """A mirrored, shuffled batch tells the student of each picture what was said of that picture."""
    model, seen = text_models(), []
    forward = UNet2DConditionModel.forward

    def spy(network, x_t, t, prompts):
        seen.append(prompts)
        return forward(network, x_t, t, prompts)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    rows = [batch_indices(3, 3, 0, step) for step in range(4)]
    assert len({tuple(order) for order in rows}) > 1
    run(model, adapt(model, "lora"), finetune(model), steps=4, random_flip=True)
    for order, prompts in zip(rows, seen, strict=True):
        assert torch.equal(prompts, model.encode_prompts([TARGETS[row] for row in order]))


def test_source_samples_are_shown_with_their_own_prompts(text_models, monkeypatch):
    model, seen = text_models(), []
    objective = objective_of("studio kept", model)

    def spy(views):
        seen.append(views.prior)
        return torch.zeros((), requires_grad=True)

    spied = dataclasses.replace(objective, terms=(dataclasses.replace(objective.terms[0], loss=spy),))
    adaptation = adapt(model, "lora")
    monkeypatch.setattr(Training, "update", lambda self: setattr(self, "step", self.step + 1) or 0.0)
    run(model, adaptation, spied, steps=4)
    pool = source_samples(model)
    for view in seen:
        rows = [int((pool.x0 == x0).flatten(1).all(1).nonzero()) for x0 in view.x0]
        assert len(set(rows)) == 3
        with adaptation.source() as source:
            expected = model.estimate(source, view.x_t, view.t, pool.prompts[rows].source).output
        torch.testing.assert_close(view.source.output, expected, rtol=1e-4, atol=1e-5)
