"""Each method is a function that returns an Objective, and its settings. docs/papers.md quotes their sources."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from domainstudio.diffusion.prediction import to_noise
from domainstudio.diffusion.schedule import over
from domainstudio.errors import UserError
from domainstudio.losses.focus import DomainFocus
from domainstudio.losses.pairwise import pairwise_divergence
from domainstudio.losses.reconstruction import high_frequency_error, simple_loss
from domainstudio.losses.transfer import DomainTransfer
from domainstudio.models.model import DiffusionModel
from domainstudio.training.ant import DomainClassifier
from domainstudio.training.objective import Objective, Pairing, PriorTarget, Space, Term, Views
from domainstudio.training.terms import (
    denoising_terms,
    features,
    high_frequencies,
    prior_error,
    weighted_hfmse,
    weighted_transfer_error,
)

Method = Literal["studio", "finetune", "dreambooth", "ddpm_pa", "domainstudio", "domainstudio_released", "ant"]
METHODS: tuple[Method, ...] = get_args(Method)


def finetune(model: DiffusionModel, snr_gamma: float | None = None) -> Objective:
    """Plain fine-tuning: L_simple, and L_vlb for learned-variance models."""
    return Objective(denoising_terms(model, snr_gamma=snr_gamma))


def dreambooth(
    model: DiffusionModel,
    with_prior_preservation: bool = True,
    prior_loss_weight: float = 1.0,
    snr_gamma: float | None = None,
) -> Objective:
    """DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): L_simple with the target prompt, and L_pr.

    L_pr is L_simple on source samples with the source prompt.
    """
    _needs_text(model, "dreambooth")
    terms = denoising_terms(model, snr_gamma=snr_gamma)
    if not with_prior_preservation:
        return Objective(terms)
    return Objective((*terms, Term("prior", prior_loss_weight, prior_error("picture"))), prior="picture")


def domainstudio(
    model: DiffusionModel,
    image_weight: float = 0.5,
    hf_weight: float = 0.5,
    hfmse_weight: float = 0.05,
    feature_weight: float = 0.0,
    transfer_weight: float = 0.0,
    nearest_class_images: int | None = None,
    pairing: Pairing = "training",
    centre_pairs: bool = False,
    high_noise_weight: float = 1.0,
    high_noise_mean_weight: float | None = None,
    high_noise_focus: float = 0.0,
    snr_gamma: float | None = None,
    space: Space | None = None,
    with_prior_preservation: bool | None = None,
    prior_loss_weight: float = 1.0,
    prior_target: PriorTarget = "picture",
) -> Objective:
    """The paper's objective in its sum form, with weights from the middle of its ranges (0.1-1, 0.1-1, 0.01-0.08).

    For text-to-image models the student is told the target prompt, the source the source prompt; image terms are
    computed on decoded pictures and L_pr is added, unless `space` and `with_prior_preservation` say otherwise.

    L_hfmse is weighted by min(1, SNR), so that the same weight serves epsilon, v, x0 and flow models.
    `feature_weight` adds the same divergence of what the networks' middle blocks say of the pairs (after DomainGallery,
    NeurIPS 2024: features know what a picture shows, where cosines of pictures mostly know their brightness).
    `transfer_weight` holds the student, on noised source samples, to these moved to the target (`DomainTransfer`),
    weighted by `x0_weight`; pairs in the model's space then compare what the target domain lets vary.
    `nearest_class_images` of the source samples are shown: those nearest to the training pictures (`nearest_first`);
    None: all.
    `centre_pairs` compares pictures after taking out the batch's mean picture, which un-centred cosines mostly measure.
    `high_noise_weight` in [0, 1] is L_simple's weight where all is noise (`level_weight`); 1 is L_simple as it is.
    `high_noise_mean_weight` is that of the part which a wrong mean of a channel makes (`mean_error`); None: the same.
    `high_noise_focus` in [0, 1] is the share of high_noise_weight that goes to what tells the training pictures from
    source samples (`DomainFocus`); of a weight of 1 there is nothing to share.
    Differs from the released code: docs/deviations.md.
    """

    text = model.condition is not None
    space = space or ("pixel" if text else "model")
    transfer = DomainTransfer() if transfer_weight else None
    focus = DomainFocus(high_noise_weight, high_noise_focus) if high_noise_focus and high_noise_weight < 1 else None
    divergence = partial(pairwise_divergence, centre=centre_pairs)

    def of_pictures(student: Tensor, source: Tensor) -> Tensor:
        if transfer is not None and space == "model":  # what does not vary in the target domain is not to be kept
            student, source = transfer.contract(student), transfer.contract(source)
        return divergence(student, source)

    terms = (
        *denoising_terms(model, high_noise_weight, high_noise_mean_weight, focus, snr_gamma),
        Term("image", image_weight, lambda v: of_pictures(v.pairs.student_image, v.pairs.source_image)),
        Term("hf", hf_weight, lambda v: of_pictures(*high_frequencies(v.pairs))),
        Term("hfmse", hfmse_weight, weighted_hfmse),
    )
    if feature_weight:
        terms += (Term("features", feature_weight, lambda v: divergence(*features(v.pairs))),)
    if transfer is not None:
        terms += (Term("transfer", transfer_weight, lambda v: weighted_transfer_error(model, v.pairs, transfer)),)
    if pairing != "source_samples":
        for name, given in (
            ("transfer_weight", transfer_weight),
            ("high_noise_focus", high_noise_focus),
            ("nearest_class_images", nearest_class_images),
        ):
            if given:
                raise UserError(
                    f'{name}={given:g} looks at source samples; use pairing "source_samples", as method studio does, '
                    f"or leave {name} out"
                )
    preserves = text if with_prior_preservation is None else with_prior_preservation
    if preserves:
        _needs_text(model, "with_prior_preservation")
        terms += (Term("prior", prior_loss_weight, prior_error(prior_target)),)
    return Objective(
        terms,
        pairing=pairing,
        prior=prior_target if preserves else "none",
        space=space,
        compares_features=feature_weight > 0,
        transfer=transfer,
        focus=focus,
        nearest=nearest_class_images,
    )


STUDIO: dict[str, Any] = {
    "image_weight": 0.1,
    "hf_weight": 0.05,
    "transfer_weight": 10.0,
    "nearest_class_images": 100,
    "pairing": "source_samples",
    "centre_pairs": True,
    "high_noise_weight": 0.2,
    "high_noise_mean_weight": 1.0,
    "high_noise_focus": 1.0,
    "space": "model",
    "with_prior_preservation": False,
    "prior_target": "source",
}
"""Our default, as settings of `domainstudio`: the paper's terms on centred pairs of noised source samples, and less
weight on high noise, but for the means of channels and where the domains can be told apart: colours and what makes the
domain come at once, composition slowly. Source samples are moved to where the training pictures lie, and those nearest
to these are shown. docs/decisions.md says why."""

STUDIO_TEXT: dict[str, Any] = STUDIO | {
    "image_weight": 0.01,
    "hf_weight": 0.005,
    "transfer_weight": 0.0,
    "nearest_class_images": None,
    "high_noise_weight": 0.1,
    "high_noise_mean_weight": None,
    "high_noise_focus": 0.0,
}
"""The same for text-to-image models. Of source samples the student is told the target prompt;
`with_prior_preservation` tells it the source prompt once more, with which it is to say what the source model says: a
style then reaches other prompts less, and its own less, too."""


def erase_identifier(model: DiffusionModel) -> Objective:
    """Takes out of a target prompt what its identifier meant before: with it, the student is to say what the source
    says with the source prompt, on noised source samples.

    Source: DomainGallery (NeurIPS 2024), prior attribute erasure.
    """
    _needs_text(model, "erase_steps")

    def difference(views: Views) -> Tensor:
        assert views.pairs.source is not None
        return simple_loss(views.pairs.student.output, views.pairs.source.output).mean()

    return Objective((Term("erase", 1.0, difference),), pairing="source_samples")


def domainstudio_released(
    model: DiffusionModel,
    image_weight: float = 4.0,
    hf_weight: float = 4.0,
    hfmse_weight: float = 1.0,
    pairing: Pairing = "training",
    space: Space = "model",
) -> Objective:
    """The released code's arithmetic: reversed KL, mean over pairs, the first three pictures, no weight over t.

    Its unconditional part; the text-to-image one never calls the source (docs/deviations.md).
    """
    if model.condition is not None:
        raise UserError("method domainstudio_released is for unconditional models; use domainstudio or studio")

    def first_three(student: Tensor, source: Tensor) -> Tensor:
        return pairwise_divergence(student[:3], source[:3], "source_student", "mean")

    terms = (
        *denoising_terms(model),
        Term("image", image_weight, lambda v: first_three(v.pairs.student_image, v.pairs.source_image)),
        Term("hf", hf_weight, lambda v: first_three(*high_frequencies(v.pairs))),
        Term("hfmse", hfmse_weight, lambda v: high_frequency_error(v.training.student_image, v.training.image).mean()),
    )
    return Objective(terms, pairing=pairing, space=space)


def ant(model: DiffusionModel, similarity_weight: float = 5.0, adversarial_steps: int = 10) -> Objective:
    """DPMs-ANT (Wang et al. 2024, arXiv 2308.11948): L_simple of the noise that is hardest to take away, which is to
    be taken away in the direction of the target domain:

    (noise - similarity_weight sigma² d log p(target | x_t) / d x_t - noise_hat)², with noise_hat the noise that the
    output implies. Its step costs 2 passes with gradients for each of `adversarial_steps`, and 2 of the source.
    Differs from the paper: docs/deviations.md.
    """
    if model.condition is not None:
        raise UserError("method ant is for unconditional models; use studio, domainstudio or dreambooth")
    classifier = DomainClassifier(model) if similarity_weight else None

    def guided_simple(views: Views) -> Tensor:
        view = views.training

        def noise_of(output: Tensor) -> Tensor:
            return to_noise(model.prediction, output, view.x_t, view.alpha, view.sigma)

        noise = noise_of(view.target)
        if classifier is not None:
            pull = over(view.sigma.square(), noise) * classifier.gradient(view.x_t, view.t)
            noise = noise - similarity_weight * pull
        return simple_loss(noise_of(view.student.output), noise).mean()

    _, *variance = denoising_terms(model)
    return Objective(
        (Term("simple", 1.0, guided_simple), *variance), adversarial_steps=adversarial_steps, classifier=classifier
    )


def method_settings(method: Method, model: DiffusionModel, **settings) -> dict[str, Any]:
    """Every setting of a method by name: those of `settings` that are not None, and the method's own values.

    Raises:
        UserError: if a setting is given to a method that has no such term.
    """
    parameters = inspect.signature(_BUILDERS[method]).parameters
    given = {name: value for name, value in settings.items() if value is not None}
    if unknown := [name for name in given if name not in parameters]:
        raise UserError(f"method {method} has no {', '.join(unknown)}; remove it, or use method domainstudio or studio")
    if given.get("pairing") == "none":
        raise UserError(f'pairing "none" leaves method {method} without its pairs; use method finetune')
    own = {name: parameter.default for name, parameter in parameters.items() if name != "model"}
    if method == "studio":
        own |= STUDIO if model.condition is None else STUDIO_TEXT
        if given.get("pairing") == "training":
            own |= {"transfer_weight": 0.0, "high_noise_focus": 0.0, "nearest_class_images": None}  # of source samples
    return own | given


def build_objective(method: Method, model: DiffusionModel, **settings) -> Objective:
    """The objective of a method by name; `settings` that are None keep the method's own value.

    Raises:
        UserError: if a setting is given to a method that has no such term.
    """
    return _BUILDERS[method](model, **method_settings(method, model, **settings))


_BUILDERS: dict[Method, Callable[..., Objective]] = {
    "studio": domainstudio,
    "finetune": finetune,
    "dreambooth": dreambooth,
    "ddpm_pa": domainstudio,  # arXiv 2211.03264: the unconditional DomainStudio objective under its first name
    "domainstudio": domainstudio,
    "domainstudio_released": domainstudio_released,
    "ant": ant,
}


def _needs_text(model: DiffusionModel, what: str) -> None:
    if model.condition is None:
        raise UserError(f"{what} needs a text-to-image model; this one is unconditional")
