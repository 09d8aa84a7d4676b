"""Each method is one function that returns an Objective. docs/papers.md quotes where the weights come from."""

import inspect
from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from domainstudio.diffusion.prediction import Prediction, v_gain
from domainstudio.diffusion.variational import variational_bound
from domainstudio.errors import UserError
from domainstudio.losses.haar import high_frequency
from domainstudio.losses.pairwise import pairwise_divergence
from domainstudio.losses.reconstruction import high_frequency_error, simple_loss
from domainstudio.models.codec import PixelCodec
from domainstudio.models.model import DiffusionModel
from domainstudio.training.objective import Objective, Pairing, Term, Views

Method = Literal["studio", "finetune", "ddpm_pa", "domainstudio", "domainstudio_released"]
METHODS: tuple[Method, ...] = get_args(Method)
Space = Literal["model", "pixel"]


def finetune(model: DiffusionModel) -> Objective:
    """Plain fine-tuning: L_simple, and L_vlb for learned-variance models."""
    return Objective(_denoising_terms(model))


def domainstudio(
    model: DiffusionModel,
    image_weight: float = 0.5,
    hf_weight: float = 0.5,
    hfmse_weight: float = 0.05,
    pairing: Pairing = "training",
    centre_pairs: bool = False,
    high_noise_weight: float = 1.0,
    space: Space = "model",
) -> Objective:
    """The paper's objective in its sum form, with weights from the middle of its ranges (0.1-1, 0.1-1, 0.01-0.08).

    L_hfmse is weighted by min(1, SNR), so that the same weight serves epsilon, v, x0 and flow models.
    `centre_pairs` compares pictures after taking out the batch's mean picture, which un-centred cosines mostly measure.
    `high_noise_weight` in [0, 1] is L_simple's weight where all is noise (`level_weight`); 1 is L_simple as it is.
    Differs from the released code: docs/deviations.md.
    """

    def divergence(student: Tensor, source: Tensor) -> Tensor:
        return pairwise_divergence(student, source, centre=centre_pairs)

    terms = (
        *_denoising_terms(model, high_noise_weight),
        Term("image", image_weight, lambda v: divergence(v.pairs.student_image, _source(v))),
        Term("hf", hf_weight, lambda v: divergence(high_frequency(v.pairs.student_image), high_frequency(_source(v)))),
        Term("hfmse", hfmse_weight, _weighted_hfmse),
    )
    return Objective(terms, pairing=pairing, space=space)


ddpm_pa = domainstudio  # arXiv 2211.03264: the unconditional DomainStudio objective under its first name


def studio(
    model: DiffusionModel,
    image_weight: float = 0.01,
    hf_weight: float = 0.005,
    hfmse_weight: float = 0.05,
    pairing: Pairing = "source_samples",
    centre_pairs: bool = True,
    high_noise_weight: float = 0.1,
    space: Space = "model",
) -> Objective:
    """Our default: the paper's terms on centred pairs of noised source samples, and little weight on high noise.

    docs/decisions.md says why.
    """
    return domainstudio(model, image_weight, hf_weight, hfmse_weight, pairing, centre_pairs, high_noise_weight, space)


def domainstudio_released(
    model: DiffusionModel,
    image_weight: float = 4.0,
    hf_weight: float = 4.0,
    hfmse_weight: float = 1.0,
    pairing: Pairing = "training",
    space: Space = "model",
) -> Objective:
    """The released code's arithmetic: reversed KL, mean over pairs, the first three pictures, no weight over t."""

    def first_three(student: Tensor, source: Tensor) -> Tensor:
        return pairwise_divergence(student[:3], source[:3], "source_student", "mean")

    terms = (
        *_denoising_terms(model),
        Term("image", image_weight, lambda v: first_three(v.pairs.student_image, _source(v))),
        Term("hf", hf_weight, lambda v: first_three(high_frequency(v.pairs.student_image), high_frequency(_source(v)))),
        Term("hfmse", hfmse_weight, lambda v: high_frequency_error(v.training.student_image, v.training.image).mean()),
    )
    return Objective(terms, pairing=pairing, space=space)


def build_objective(method: Method, model: DiffusionModel, **settings) -> Objective:
    """The objective of a method by name; `settings` that are None keep the method's own value.

    Raises:
        UserError: if a setting is given to a method that has no such term.
    """
    builders: dict[str, Callable[..., Objective]] = {
        "studio": studio,
        "finetune": finetune,
        "ddpm_pa": ddpm_pa,
        "domainstudio": domainstudio,
        "domainstudio_released": domainstudio_released,
    }
    build, given = builders[method], {name: value for name, value in settings.items() if value is not None}
    if unknown := [name for name in given if name not in inspect.signature(build).parameters]:
        raise UserError(f"method {method} has no {', '.join(unknown)}; remove it, or use method domainstudio or studio")
    if given.get("pairing") == "none":
        raise UserError(f'pairing "none" leaves method {method} without its pairs; use method finetune')
    return build(model, **given)


def level_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, high_noise_weight: float) -> Tensor:
    """L_simple's weight at each noise level, (B,): `high_noise_weight` where all is noise, 1 where all is picture.

    At high noise a network decides how a picture is composed, and ten pictures taught there are soon recited; at low
    noise it learns how they are drawn. An error of v or of a flow is weighted by
    w = high_noise_weight + (1 - high_noise_weight) alpha⁴ / (alpha⁴ + sigma⁴). An error of epsilon is by itself alpha²
    of the same error of v, one of x0 sigma² of it; they are weighted by min(1, w / alpha²) and min(1, w / sigma²).
    """
    picture, noise = alpha**4, sigma**4
    weight = high_noise_weight + (1 - high_noise_weight) * picture / (picture + noise)
    return (weight * v_gain(prediction, alpha, sigma).square()).clamp(max=1)


def _denoising_terms(model: DiffusionModel, high_noise_weight: float = 1.0) -> tuple[Term, ...]:
    def weighted_simple(views: Views) -> Tensor:
        view = views.training
        weight = level_weight(model.prediction, view.alpha, view.sigma, high_noise_weight)
        return (weight * simple_loss(view.student.output, view.target)).mean()

    simple = Term("simple", 1.0, weighted_simple)
    if not model.learned_variance:
        return (simple,)
    if not isinstance(model.codec, PixelCodec):
        raise UserError("learned-variance models are supported in pixel space; this one is latent")
    alphas_cumprod = model.schedule.alphas_cumprod  # pyright: ignore[reportAttributeAccessIssue]

    def bound(views: Views) -> Tensor:
        view = views.training
        assert view.student.variance is not None
        estimate = view.student.x0
        return variational_bound(view.x0, view.x_t, estimate, view.student.variance, view.t, alphas_cumprod).mean()

    return simple, Term("vlb", 0.001 * len(alphas_cumprod), bound)


def _source(views: Views) -> Tensor:
    assert views.pairs.source_image is not None, "pairwise terms need a pairing"
    return views.pairs.source_image


def _weighted_hfmse(views: Views) -> Tensor:
    view = views.training
    return (view.snr_weight * high_frequency_error(view.student_image, view.image)).mean()
