"""The terms that objectives are put together from (methods.py)."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from domainstudio.diffusion.schedule import over
from domainstudio.diffusion.variational import variational_bound
from domainstudio.diffusion.weighting import level_weight, min_snr_weight, x0_weight
from domainstudio.errors import UserError
from domainstudio.losses.focus import DomainFocus
from domainstudio.losses.haar import high_frequency
from domainstudio.losses.reconstruction import high_frequency_error, mean_error, simple_loss
from domainstudio.losses.transfer import DomainTransfer
from domainstudio.models.codec import PixelCodec
from domainstudio.models.model import DiffusionModel
from domainstudio.training.objective import PriorTarget, Term, View, Views


def denoising_terms(
    model: DiffusionModel,
    high_noise_weight: float = 1.0,
    high_noise_mean_weight: float | None = None,
    focus: DomainFocus | None = None,
    snr_gamma: float | None = None,
) -> tuple[Term, ...]:
    """L_simple, weighted by noise level and, with a `focus`, by number; and L_vlb for learned-variance models."""
    if high_noise_mean_weight is None:
        high_noise_mean_weight = high_noise_weight
    if snr_gamma is not None:
        for name, given in (
            ("high_noise_weight", high_noise_weight),
            ("high_noise_mean_weight", high_noise_mean_weight),
        ):
            if given != 1:
                raise UserError(
                    f"snr_gamma={snr_gamma:g} and {name}={given:g} both weight noise levels; give one of them ({name} "
                    "1 is none)"
                )

    def weighted_simple(views: Views) -> Tensor:
        view = views.training
        output, target = view.student.output, view.target
        level_of = partial(level_weight, model.prediction)
        if snr_gamma is not None:
            weight = min_snr_weight(model.prediction, view.alpha, view.sigma, snr_gamma)
        else:
            weight = level_of(view.alpha, view.sigma, high_noise_weight)
        if focus is None:
            loss = weight * simple_loss(output, target)
        else:
            levels = over(view.alpha, output), over(view.sigma, output)
            assert focus.weight is not None, "fit it first"
            loss = simple_loss(output, target, level_of(*levels, focus.weight))
        if high_noise_mean_weight != high_noise_weight:
            of_means = level_of(view.alpha, view.sigma, high_noise_mean_weight) - weight
            loss = loss + of_means * mean_error(output, target)
        return loss.mean()

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


def prior_error(held_to: PriorTarget) -> Callable[[Views], Tensor]:
    """L_pr: the student with the source prompt, held to the pictures or to the source's output."""

    def error(views: Views) -> Tensor:
        view = views.prior
        assert view is not None
        if held_to == "picture":
            return simple_loss(view.student.output, view.target).mean()
        assert view.source is not None
        return simple_loss(view.student.output, view.source.output).mean()

    return error


def high_frequencies(view: View) -> tuple[Tensor, Tensor]:
    """The student's and the source's, (B, C, h / 2, w / 2) each."""
    return high_frequency(view.student_image), high_frequency(view.source_image)


def features(view: View) -> tuple[Tensor, Tensor]:
    """What the middle blocks of student and source say, in the precision of pictures."""
    assert view.student.features is not None
    assert view.source is not None
    assert view.source.features is not None
    return view.student.features.to(view.x0), view.source.features.to(view.x0)


def weighted_transfer_error(model: DiffusionModel, view: View, transfer: DomainTransfer) -> Tensor:
    """L_transfer, by `x0_weight`."""
    weight = x0_weight(model.prediction, view.alpha, view.sigma)
    return (weight * transfer.error(view.student.x0, view.x0)).mean()


def weighted_hfmse(views: Views) -> Tensor:
    """L_hfmse, by min(1, SNR)."""
    view = views.training
    return (view.snr_weight * high_frequency_error(view.student_image, view.image)).mean()
