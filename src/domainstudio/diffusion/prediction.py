"""What a network's output means, and the clean image it implies. One table covers all parameterisations.

output = a x0 + b noise, with (a, b) = epsilon (0, 1), x0 (1, 0), v (-sigma, alpha), flow (-1, 1); together with
x_t = alpha x0 + sigma noise this gives x0 = (b x_t - sigma output) / (b alpha - a sigma), and
noise = (alpha output - a x_t) / (b alpha - a sigma).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from domainstudio.diffusion.schedule import over

Prediction = Literal["epsilon", "x0", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def coefficients(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each (B,), with output = a x0 + b noise; alpha and sigma are (B,)."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match prediction:
        case "epsilon":
            return zero, one
        case "x0":
            return one, zero
        case "v":
            return -sigma, alpha
        case "flow":
            return -one, one
    raise ValueError(f"prediction={prediction!r}: expected one of {', '.join(PREDICTIONS)}")


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network would output for x_t = alpha x0 + sigma noise; x0 and noise (B, ...), levels (B,)."""
    a, b = coefficients(prediction, alpha, sigma)
    return over(a, x0) * x0 + over(b, x0) * noise


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean image (B, ...) that `output` (B, ...) implies for `x_t` (B, ...).

    Undefined only for epsilon at alpha = 0, where x_t holds no image.
    """
    a, b = coefficients(prediction, alpha, sigma)
    if prediction == "x0":
        return over(a, output) * output  # the formula below is 0 / 0 at sigma = 0
    return (over(b, x_t) * x_t - over(sigma, x_t) * output) / over(b * alpha - a * sigma, x_t)


def to_noise(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise (B, ...) that `output` (B, ...) implies for `x_t` (B, ...).

    Undefined only for x0 at sigma = 0, where x_t holds no noise.
    """
    a, b = coefficients(prediction, alpha, sigma)
    if prediction == "epsilon":
        return output  # the formula below is 0 / 0 at alpha = 0
    return (over(alpha, output) * output - over(a, x_t) * x_t) / over(b * alpha - a * sigma, x_t)


def v_gain(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Factor (B,) from an error of the output to the error of v it means: 1 / |b alpha - a sigma|.

    1 for v (where alpha² + sigma² = 1) and flow, 1 / alpha for epsilon, 1 / sigma for x0 (unbounded).
    """
    a, b = coefficients(prediction, alpha, sigma)
    return 1 / (b * alpha - a * sigma).abs()
