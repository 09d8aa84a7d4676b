import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from training_kit import UNCONDITIONAL, adapt, look_at, perturb

from domainstudio.diffusion.prediction import PREDICTIONS, to_x0
from domainstudio.diffusion.schedule import over
from domainstudio.diffusion.weighting import level_weight
from domainstudio.errors import UserError
from domainstudio.training.methods import build_objective

PAIRED = [method for method in UNCONDITIONAL if method not in ("finetune", "ant")]


@pytest.mark.parametrize("method", UNCONDITIONAL)
@pytest.mark.parametrize("name", ["pixel_learned", "pixel_flow", "latent_v"])
def test_every_method_builds_for_every_kind_of_model(models, method, name):
    model = models(name)
    objective = build_objective(method, model)
    names = [term.name for term in objective.terms]
    expected = ["simple", *(["vlb"] if name == "pixel_learned" else [])]
    expected += ["image", "hf", "hfmse"] if method in PAIRED else []
    expected += ["transfer"] if method == "studio" else []
    assert names == expected
    assert (objective.pairing == "none") == (method not in PAIRED)
    adaptation = adapt(model, "full")
    perturb(adaptation)
    views = look_at(model, adaptation, objective)
    total, parts = objective(views)
    by_hand = sum(term.weight * parts[term.name].item() for term in objective.terms)
    assert total.item() == pytest.approx(by_hand, rel=1e-5)
    assert all(value.ndim == 0 and not value.requires_grad for value in parts.values())


@pytest.mark.parametrize(
    "setting", [{"image_weight": 1.0}, {"hf_weight": 0.0}, {"pairing": "training"}, {"space": "pixel"}]
)
def test_finetuning_refuses_pairwise_settings(models, setting):
    with pytest.raises(UserError, match=f"finetune has no {next(iter(setting))}; remove it"):
        build_objective("finetune", models("pixel_epsilon"), **setting)


@pytest.mark.parametrize("name", ["pixel_learned", "pixel_flow", "latent_v"])
def test_prompts_cannot_be_learned_without_a_text_model(models, name):
    model = models(name)
    with pytest.raises(UserError, match="dreambooth needs a text-to-image model; this one is unconditional"):
        build_objective("dreambooth", model)
    for method in ("studio", "domainstudio", "ddpm_pa"):
        with pytest.raises(UserError, match="with_prior_preservation needs a text-to-image model"):
            build_objective(method, model, with_prior_preservation=True)
        assert build_objective(method, model, with_prior_preservation=False).prior == "none"


@pytest.mark.parametrize("setting", [{"centre_pairs": True}, {"high_noise_weight": 0.5}])
def test_the_released_arithmetic_is_what_it_is(models, setting):
    with pytest.raises(UserError, match=f"domainstudio_released has no {next(iter(setting))}"):
        build_objective("domainstudio_released", models("pixel_epsilon"), **setting)


@pytest.mark.parametrize("method", UNCONDITIONAL)
def test_settings_that_are_none_keep_the_methods_own(models, method):
    names = ("image_weight", "hf_weight", "pairing", "space", "snr_gamma", "with_prior_preservation")
    model, nothing = models("pixel_epsilon"), dict.fromkeys(names)
    given, plain = build_objective(method, model, **nothing), build_objective(method, model)
    assert [t.weight for t in given.terms] == [t.weight for t in plain.terms]
    assert (given.pairing, given.prior, given.space) == (plain.pairing, plain.prior, plain.space)


@pytest.mark.parametrize("method", PAIRED)
def test_settings_reach_the_objective(models, method):
    objective = build_objective(
        method, models("latent_v"), image_weight=7.0, hf_weight=8.0, hfmse_weight=9.0, pairing="training", space="pixel"
    )
    weights = {term.name: term.weight for term in objective.terms}
    assert (weights["image"], weights["hf"], weights["hfmse"]) == (7, 8, 9)
    assert (objective.pairing, objective.space) == ("training", "pixel")
    with pytest.raises(UserError, match="without its pairs"):
        build_objective(method, models("latent_v"), pairing="none")


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize("removed", ["image", "hf", "hfmse"])
def test_weight_zero_is_the_term_removed(models, method, removed):
    model = models("pixel_v")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    objective = build_objective(method, model, **{f"{removed}_weight": 0.0})
    complete = build_objective(method, model)
    without = dataclasses.replace(complete, terms=tuple(t for t in complete.terms if t.name != removed))
    zero, gone, whole = (each(look_at(model, adaptation, each))[0] for each in (objective, without, complete))
    torch.testing.assert_close(zero, gone, rtol=1e-6, atol=0)
    assert zero.item() != whole.item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weight_of_a_noise_level(prediction):
    """It rises from the noisiest level to the cleanest, and 1 leaves L_simple as it is; no level makes it infinite."""
    sigma = torch.linspace(0, 1, 101).double()
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma.square()).sqrt()
    weight = level_weight(prediction, alpha, sigma, 0.1)
    assert weight.isfinite().all()
    assert weight[0] == 1
    assert (weight > 0.09).all()
    assert (weight <= 1).all()
    torch.testing.assert_close(level_weight(prediction, alpha, sigma, 1.0), torch.ones_like(sigma), rtol=0, atol=1e-12)
    if prediction != "epsilon":  # whose own error counts less at high noise
        assert weight[-1] == pytest.approx(0.1)
        assert (weight.diff() <= 1e-12).all()


@pytest.mark.parametrize("name", ["pixel_epsilon", "latent_v"])
def test_colours_have_a_weight_of_their_own_at_high_noise(models, name):
    model = models(name)
    adaptation = adapt(model, "full")
    perturb(adaptation)
    views = look_at(model, adaptation, build_objective("domainstudio", model))

    def simple(method="domainstudio", **given):
        return build_objective(method, model, **given)(views)[1]["simple"].item()

    plain, low = simple(), simple(high_noise_weight=0.05)
    apart = simple(high_noise_weight=0.05, high_noise_mean_weight=1.0)
    assert low < apart < plain
    assert simple(high_noise_weight=0.05, high_noise_mean_weight=0.05) == low
    default = simple(high_noise_weight=0.2, high_noise_mean_weight=1.0)
    assert simple("studio", transfer_weight=0.0, high_noise_focus=0.0) == default
    view = views.training
    of_means = (view.student.output - view.target).double().mean((2, 3)).square().mean(1)
    taken = (1 - level_weight(model.prediction, view.alpha, view.sigma, 0.0)) * of_means
    assert simple(high_noise_mean_weight=0.0) == pytest.approx(plain - taken.mean().item(), rel=1e-5)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_feature_term_compares_what_middle_blocks_say(models, adapter):
    model = models("latent_v")
    adaptation = adapt(model, adapter)
    objective = build_objective("studio", model, feature_weight=1.0, centre_pairs=False)
    assert objective(look_at(model, adaptation, objective))[1]["features"].item() == pytest.approx(0, abs=1e-6)
    perturb(adaptation, 0.1)
    views = look_at(model, adaptation, objective)
    said = []
    with torch.no_grad():
        for network in (adaptation.network, None):
            with contextlib.ExitStack() as stack:
                network = network or stack.enter_context(adaptation.source())
                hook = network.mid_block.register_forward_hook(lambda _, __, output: said.append(output))
                stack.callback(hook.remove)
                network(views.pairs.x_t, views.pairs.t)
    p, q = (_softmaxes(features.double()) for features in said)
    expected = sum(a * math.log(a / b) for of, to in zip(p, q, strict=True) for a, b in zip(of, to, strict=True))
    assert expected > 1e-4
    assert objective(views)[1]["features"].item() == pytest.approx(expected, rel=1e-3)


def test_the_feature_term_teaches_what_comes_before_the_middle_block(models):
    model = models("latent_v")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    objective = build_objective("studio", model, feature_weight=1.0)
    views = look_at(model, adaptation, objective)
    next(term for term in objective.terms if term.name == "features").loss(views).backward()
    taught = [name for name, p in adaptation.network.named_parameters() if p.grad is not None and p.grad.any()]
    reached = {name.partition(".")[0] for name in taught}
    assert {"conv_in", "down_blocks", "mid_block"} <= reached
    assert not {"up_blocks", "conv_out"} & reached


@pytest.mark.parametrize("setting", ["feature_weight", "transfer_weight"])
@pytest.mark.parametrize("method", ["finetune", "domainstudio_released", "ant"])
def test_methods_without_a_feature_or_transfer_term(models, method, setting):
    with pytest.raises(UserError, match=f"{method} has no {setting}"):
        build_objective(method, models("pixel_epsilon"), **{setting: 1.0})


def test_without_transfer_pairs_compare_all_there_is(models):
    """What its weight of zero removes, besides the term: pairs of the paper's method, with the same settings."""
    model = models("pixel_v")
    adaptation = adapt(model, "full")
    perturb(adaptation, 0.1)
    objective, without = build_objective("studio", model), build_objective("studio", model, transfer_weight=0.0)
    paired = build_objective("domainstudio", model, pairing="source_samples", centre_pairs=True)
    whole, plain, same = (each(look_at(model, adaptation, each))[1] for each in (objective, without, paired))
    assert set(whole) - set(plain) == {"transfer"}
    for name in ("image", "hf"):
        assert plain[name] == same[name] != whole[name]
    decoded = build_objective("studio", model, space="pixel")
    views = look_at(model, adaptation, decoded)
    assert decoded(views)[1]["image"] == paired(views)[1]["image"], "the transfer is of the model's own space"


@pytest.mark.parametrize(
    ("name", "value"), [("transfer_weight", 3.0), ("high_noise_focus", 0.5), ("nearest_class_images", 20)]
)
def test_what_looks_at_source_samples_needs_them(models, name, value):
    model, given = models("pixel_epsilon"), {name: value}
    told = f'{name}={value:g} looks at source samples; use pairing "source_samples", as method studio does, or leave'
    with pytest.raises(UserError, match=told):
        build_objective("domainstudio", model, **given)
    with_samples = build_objective("domainstudio", model, **given, pairing="source_samples", high_noise_weight=0.5)
    assert with_samples.needs_fitting
    assert not build_objective("studio", model, pairing="training").needs_fitting


def test_focus_leaves_one_sum_of_weights(models):
    """Pictures that differ from source samples in one place: what goes there is taken from everywhere else."""
    model = models("pixel_v")
    adaptation = adapt(model, "full")
    perturb(adaptation)
    plain = build_objective("studio", model, high_noise_focus=0.0, high_noise_mean_weight=0.2)
    views = look_at(model, adaptation, plain)
    where = torch.zeros(views.training.x0.shape[1:])
    where[:, :4, :4] = 1

    def simple(share):
        objective = build_objective("studio", model, high_noise_focus=share, high_noise_mean_weight=0.2)
        if objective.focus is not None:
            objective.focus.fit(where.expand(10, 1, -1, -1, -1), 0 * where.expand(300, -1, -1, -1))
        return objective.terms[0].loss(views).item()

    view, high = views.training, 0.2
    errors = (view.student.output - view.target).double().square()
    rise = over(view.alpha.double() ** 4 / (view.alpha.double() ** 4 + view.sigma.double() ** 4), errors)
    for share in (0.0, 0.5, 1.0):
        at_noise = high * (1 - share + share * where / where.mean()).double().clamp(max=1 / high)
        expected = ((at_noise + (1 - at_noise) * rise) * errors).mean().item()
        assert simple(share) == pytest.approx(expected, rel=1e-5)
    assert simple(0.0) == plain.terms[0].loss(views).item()
    assert build_objective("studio", model, high_noise_weight=1.0).focus is None


def test_all_weights_zero_is_finetuning(models):
    model = models("pixel_learned")
    adaptation = adapt(model, "full")
    zero = build_objective("domainstudio", model, image_weight=0.0, hf_weight=0.0, hfmse_weight=0.0)
    views = look_at(model, adaptation, zero)
    torch.testing.assert_close(zero(views)[0], build_objective("finetune", model)(views)[0], rtol=1e-6, atol=0)


def _hf(picture):
    """LH + HL + HH of one (C, H, W) picture by 2x2 blocks, one coefficient at a time."""
    c, h, w = picture.shape
    out = torch.zeros(c, h // 2, w // 2, dtype=picture.dtype)
    for k in range(c):
        for i in range(h // 2):
            for j in range(w // 2):
                a, b = picture[k, 2 * i, 2 * j], picture[k, 2 * i, 2 * j + 1]
                d, e = picture[k, 2 * i + 1, 2 * j], picture[k, 2 * i + 1, 2 * j + 1]
                out[k, i, j] = (-a + b - d + e) / 2 + (-a - b + d + e) / 2 + (a - b - d + e) / 2
    return out


def _softmaxes(pictures):
    """p_i over j != i of cos(x_i, x_j), as lists."""
    rows = []
    for i, x in enumerate(pictures):
        others = [y for j, y in enumerate(pictures) if j != i]
        weights = [math.exp((x * y).sum() / (x.norm() * y.norm())) for y in others]
        rows.append([w / sum(weights) for w in weights])
    return rows


def _kl(ps, qs):
    return sum(p * math.log(p / q) for row, other in zip(ps, qs, strict=True) for p, q in zip(row, other, strict=True))


def _level_weight(prediction, alpha, sigma, at_high_noise):
    weight = at_high_noise + (1 - at_high_noise) * alpha**4 / (alpha**4 + sigma**4)
    own = {"epsilon": alpha**2, "x0": sigma**2, "v": 1.0, "flow": 1.0}[prediction]
    return min(1.0, weight / own)


def _slow_terms(views, prediction, method):
    """Every term with loops in float64, from what was noised and what the networks said."""
    transfer, contract = _slow_transfer(views, prediction)
    training, pairs = views.training, views.pairs
    student, source = list(pairs.student_image.detach().double()), list(pairs.source_image.double())
    released, ours = method == "domainstudio_released", method == "studio"
    if released:
        student, source = student[:3], source[:3]

    def divergence(one, two):
        if ours:
            one, two = ([contract(x) for x in side] for side in (one, two))
            one, two = ([x / x.norm() for x in side] for side in (one, two))
            one, two = ([x - sum(side) / len(side) for x in side] for side in (one, two))
        return _kl(_softmaxes(two), _softmaxes(one)) / 6 if released else _kl(_softmaxes(one), _softmaxes(two))

    hfmse = 0.0
    for i, (estimate, picture) in enumerate(zip(training.student_image.detach().double(), training.image, strict=True)):
        snr = (training.alpha[i].double() / training.sigma[i].double()) ** 2
        weight = 1.0 if released else min(1.0, snr.item())
        hfmse += weight * (_hf(estimate) - _hf(picture.double())).square().mean().item() / len(training.t)
    simple, focus = 0.0, _slow_focus(views) if ours else None
    for i, error in enumerate(training.student.output.detach().double() - training.target.double()):
        level = prediction, training.alpha[i].item(), training.sigma[i].item()
        if not ours:
            simple += error.square().mean().item() / len(training.t)
            continue
        for place in np.ndindex(error.shape):
            counts = _level_weight(*level, min(1.0, 0.2 * focus[place]))
            simple += counts * error[place].item() ** 2 / error.numel() / len(training.t)
        colours = _level_weight(*level, 1.0) - _level_weight(*level, 0.2)
        simple += colours * error.mean((1, 2)).square().mean().item() / len(training.t)
    hf_student, hf_source = [_hf(x) for x in student], [_hf(x) for x in source]
    return {
        "simple": simple,
        "image": divergence(student, source),
        "hf": divergence(hf_student, hf_source),
        "hfmse": hfmse,
        "transfer": transfer if ours else 0.0,
    }


def _slow_focus(views):
    """What each number counts of the weight at high noise, number by number."""
    target, source = (view.x0.double().numpy() for view in (views.training, views.pairs))
    told = np.zeros(target.shape[1:])
    for channel, *place in np.ndindex(told.shape):
        one, other = target[:, channel, *place], source[:, channel, *place]
        ratio = min(1.0, target[:, channel].var(0, ddof=1).sum() / source[:, channel].var(0, ddof=1).sum())
        chance = one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)
        apart = max(0.0, (one.mean() - other.mean()) ** 2 - chance)
        of_source = other.var(ddof=1) + apart
        told[channel, *place] = max(0.0, 1 - ratio * other.var(ddof=1) / of_source)
    return told / told.mean()


def _pooled(pictures):
    """Covariance of channels, mean over places."""
    return sum(np.cov(at.T) for at in pictures.swapaxes(0, 1)) / pictures.shape[1]


def _slow_transfer(views, prediction):
    """The term, and what of a picture varies in the target domain.

    Directions are eigenvectors of inverse(cov_S) cov_T; every place for itself; the variance is that of each picture
    about what the others say.
    """
    target, source, x = (
        rearranged.double().detach().flatten(2).movedim(1, -1).numpy()  # picture, place, channel
        for rearranged in (views.training.x0, views.pairs.x0, views.pairs.student.x0)
    )
    cov_s = _pooled(source)

    def directions_of(pictures):
        ratios, directions = np.linalg.eig(np.linalg.inv(cov_s) @ _pooled(pictures))
        return directions[:, np.argsort(ratios)]

    directions, n = directions_of(target), len(target)
    ratios = np.zeros(len(cov_s))
    for i in range(n):
        others = np.delete(target, i, 0)
        for k, direction in enumerate(directions_of(others).T):
            apart = (target[i] - others.mean(0)) @ direction
            ratios[k] += (apart**2).mean() / (direction @ cov_s @ direction) * (n - 1) / n / n
    total = 0.0
    for ratio, direction in zip(ratios, directions.T, strict=True):
        spread_s = direction @ cov_s @ direction
        for place in range(x.shape[1]):
            of_target, of_source = target[:, place] @ direction, source[:, place] @ direction
            apart = (of_target.mean() - of_source.mean()) ** 2 / spread_s - ratio / len(target) - 1 / len(source)
            counts = max(0.0, 1 - ratio / (1 + max(0.0, apart)))
            for i in range(len(x)):
                moved = of_target.mean() + math.sqrt(min(1.0, ratio)) * (of_source[i] - of_source.mean())
                snr = (views.pairs.alpha[i].item() / views.pairs.sigma[i].item()) ** 2
                weight = min(1.0, snr) if prediction == "epsilon" else 1.0
                total += weight * counts * (x[i, place] @ direction - moved) ** 2 / x.size
    scale = np.diag(np.sqrt(np.minimum(1, ratios)))
    kept = torch.from_numpy(np.linalg.inv(directions.T) @ scale @ directions.T)
    return total, lambda picture: torch.einsum("dc,chw->dhw", kept, picture)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("domainstudio", "pixel_epsilon"),
        ("domainstudio", "latent_flow"),
        ("ddpm_pa", "pixel_v"),
        ("studio", "pixel_v"),
        ("studio", "pixel_epsilon"),
        ("studio", "pixel_x0"),
        ("studio", "latent_flow"),
        ("domainstudio_released", "pixel_x0"),
    ],
)
def test_the_loss_is_that_of_slow_loops(models, method, name):
    model = models(name)
    adaptation = adapt(model, "full")
    perturb(adaptation, 0.1)
    objective = build_objective(method, model)
    views = look_at(model, adaptation, objective)
    total, parts = objective(views)
    slow = _slow_terms(views, model.prediction, method)
    for term in objective.terms:
        assert parts[term.name].item() == pytest.approx(slow[term.name], rel=1e-3, abs=2e-6), term.name
    assert slow["image"] > 1e-5
    assert (slow["transfer"] > 1e-2) == (method == "studio")
    assert total.item() == pytest.approx(sum(t.weight * slow[t.name] for t in objective.terms), rel=1e-4)


@pytest.mark.parametrize("name", ["pixel_epsilon", "pixel_learned", "pixel_v", "pixel_x0", "latent_v", "pixel_flow"])
def test_the_target_is_what_gives_back_the_clean_picture(models, name):
    model = models(name)
    view = look_at(model, adapt(model, "full"), build_objective("finetune", model)).training
    x0 = to_x0(model.prediction, view.target.double(), view.x_t.double(), view.alpha.double(), view.sigma.double())
    torch.testing.assert_close(x0.float(), view.x0, rtol=1e-3, atol=1e-3)


def test_learned_variance_is_trained_by_the_bound_and_the_mean_is_not(models):
    model = models("pixel_learned")
    adaptation = adapt(model, "full")
    objective = build_objective("finetune", model)
    views = look_at(model, adaptation, objective)
    simple, vlb = objective.terms
    assert (simple.weight, vlb.weight) == (1, 1), "0.001 a step of the schedule's 1000"
    last = adaptation.network.conv_out
    (of_bound,) = torch.autograd.grad(vlb.loss(views), last.weight, retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.loss(views), last.weight)
    assert torch.equal(of_bound[:3], torch.zeros_like(of_bound[:3]))
    assert (of_bound[3:] != 0).all()
    assert (of_simple[:3] != 0).all()
    assert torch.equal(of_simple[3:], torch.zeros_like(of_simple[3:]))


def test_learned_variance_of_latents_is_refused(models):
    model = dataclasses.replace(models("latent_epsilon"), learned_variance=True)
    with pytest.raises(UserError, match="pixel space; this one is latent"):
        build_objective("finetune", model)
