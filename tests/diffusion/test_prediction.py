import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from domainstudio.diffusion.prediction import PREDICTIONS, coefficients, target, to_noise, to_x0, v_gain
from domainstudio.diffusion.schedule import DiscreteSchedule, FlowSchedule, add_noise, over

DIFFUSERS_NAMES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (3, 4, 4)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(num, generator):
    return torch.randn(num, *SHAPE, generator=generator, dtype=torch.float64)


def variance_preserving_levels(num=400):
    """From alpha = 1 down to 0.005, a little below the last step of the linear schedule (0.0064)."""
    angle = torch.linspace(0, math.acos(0.005), num, dtype=torch.float64)
    return angle.cos(), angle.sin()


def flow_levels(num=400):
    sigma = torch.linspace(0, 0.995, num, dtype=torch.float64)
    return 1 - sigma, sigma


def unrelated_levels(num=400):
    """Neither variance preserving nor summing to one."""
    generator = torch.Generator().manual_seed(1)
    levels = 0.05 + 3 * torch.rand(2, num, generator=generator, dtype=torch.float64)
    return levels[0], levels[1]


def double_precision(scheduler_class, **config):
    scheduler = scheduler_class(clip_sample=False, **config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def test_the_table():
    alpha, sigma = torch.tensor([0.8, 0.6]).double(), torch.tensor([0.6, 0.8]).double()
    table = {p: torch.stack(coefficients(p, alpha, sigma)).tolist() for p in PREDICTIONS}
    a, b = alpha.tolist(), sigma.tolist()
    assert table == {
        "epsilon": [[0, 0], [1, 1]],
        "x0": [[1, 1], [0, 0]],
        "v": [[-b[0], -b[1]], a],
        "flow": [[-1, -1], [1, 1]],
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_is_the_written_out_formula(prediction, generator):
    x0, noise = randn(2, generator), randn(2, generator)
    alpha, sigma = torch.tensor([0.8, 0.28]).double(), torch.tensor([0.6, 0.96]).double()
    for i in range(2):
        expected = {
            "epsilon": noise[i],
            "x0": x0[i],
            "v": alpha[i] * noise[i] - sigma[i] * x0[i],
            "flow": noise[i] - x0[i],
        }[prediction]
        torch.testing.assert_close(target(prediction, x0, noise, alpha, sigma)[i], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", [variance_preserving_levels, flow_levels, unrelated_levels])
def test_the_target_leads_back_to_the_clean_image(prediction, levels, generator):
    alpha, sigma = levels()
    x0, noise = randn(len(alpha), generator), randn(len(alpha), generator)
    x_t = add_noise(x0, noise, alpha, sigma)
    back = to_x0(prediction, target(prediction, x0, noise, alpha, sigma), x_t, alpha, sigma)
    assert (back - x0).abs().max() < 1e-12
    x_t, x0, noise, alpha, sigma = (values[1:] for values in (x_t, x0, noise, alpha, sigma))  # without sigma = 0
    back = to_noise(prediction, target(prediction, x0, noise, alpha, sigma), x_t, alpha, sigma)
    assert (back - noise).abs().max() < 1e-11


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pictures_without_noise_say_no_noise_of_x0_alone(prediction, generator):
    x0, noise, sigma = randn(2, generator), randn(2, generator), torch.zeros(2).double()
    back = to_noise(prediction, target(prediction, x0, noise, sigma + 1, sigma), x0, sigma + 1, sigma)
    if prediction == "x0":
        assert not back.isfinite().any()
    else:
        assert (back - noise).abs().max() < 1e-14
    assert torch.equal(to_noise("epsilon", noise, noise, sigma, sigma + 1), noise)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_pure_noise_is_undefined_for_epsilon_alone(prediction, generator):
    x0, noise, alpha = randn(2, generator), randn(2, generator), torch.zeros(2).double()
    output = target(prediction, x0, noise, alpha, alpha + 1)
    assert (to_x0(prediction, output, noise, alpha, alpha + 1) - x0).abs().max() < 1e-14
    assert not to_x0("epsilon", noise, noise, alpha, alpha + 1).isfinite().any()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_image_without_noise_is_defined_for_all(prediction, generator):
    x0, noise, sigma = randn(2, generator), randn(2, generator), torch.zeros(2).double()
    output = target(prediction, x0, noise, sigma + 1, sigma)
    assert torch.equal(to_x0(prediction, output, x0, sigma + 1, sigma), x0)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", DIFFUSERS_NAMES)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_diffusers_steps_see_the_same_clean_image(scheduler_class, prediction, beta_schedule, generator):
    scheduler = double_precision(
        scheduler_class, beta_schedule=beta_schedule, prediction_type=DIFFUSERS_NAMES[prediction]
    )
    scheduler.set_timesteps(1000)
    schedule = DiscreteSchedule(scheduler.alphas_cumprod)
    for t in (0, 1, 10, 300, 700, 950):
        output, x_t = randn(1, generator), randn(1, generator)
        theirs = scheduler.step(output, t, x_t, generator=generator).pred_original_sample
        ours = to_x0(prediction, output, x_t, *schedule.levels(torch.tensor([t])))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_v_is_the_velocity_of_diffusers(generator):
    scheduler = double_precision(DDPMScheduler)
    t = torch.tensor([0, 1, 17, 500, 999])
    x0, noise = randn(len(t), generator), randn(len(t), generator)
    ours = target("v", x0, noise, *DiscreteSchedule(scheduler.alphas_cumprod).levels(t))
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-14)


def test_flow_is_the_flow_matching_of_diffusers(generator):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = scheduler.timesteps.double()
    scheduler.sigmas = scheduler.timesteps / 1000
    t = scheduler.timesteps[[0, 1, 500, 998, 999]]
    x0, noise = randn(len(t), generator), randn(len(t), generator)
    alpha, sigma = FlowSchedule().levels(t)
    x_t = add_noise(x0, noise, alpha, sigma)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise), rtol=0, atol=1e-14)

    output = randn(len(t), generator)
    ours = to_x0("flow", output, x_t, alpha, sigma)
    torch.testing.assert_close(ours, x_t - over(sigma, x_t) * output, rtol=0, atol=1e-14)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.7])  # one Euler step, from sigma = 0.7 to 0; diffusers takes it in float32
    theirs = scheduler.step(output[2], scheduler.timesteps[0], x_t[2]).prev_sample
    level = torch.tensor([0.7]).double()
    torch.testing.assert_close(to_x0("flow", output[2:3], x_t[2:3], 1 - level, level)[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gain_is_the_slope_of_v(prediction, generator):
    alpha, sigma = (level[1::20] for level in variance_preserving_levels())
    output, x_t = randn(len(alpha), generator), randn(len(alpha), generator)

    def v_of(output):
        x0 = to_x0(prediction, output, x_t, alpha, sigma)
        noise = (x_t - over(alpha, x0) * x0) / over(sigma, x0)
        return target("v", x0, noise, alpha, sigma)

    step = 1e-4  # v is linear in the output, so only rounding limits the difference quotient
    slopes = ((v_of(output + step) - v_of(output - step)) / (2 * step)).abs().flatten(1)
    gain = v_gain(prediction, alpha, sigma)
    assert gain.shape == alpha.shape
    torch.testing.assert_close(slopes, gain[:, None].expand_as(slopes), rtol=1e-7, atol=1e-7)


def test_gains_as_documented():
    alpha, sigma = (level[1:] for level in variance_preserving_levels())
    torch.testing.assert_close(v_gain("epsilon", alpha, sigma), 1 / alpha, rtol=1e-14, atol=0)
    torch.testing.assert_close(v_gain("x0", alpha, sigma), 1 / sigma, rtol=1e-14, atol=0)
    torch.testing.assert_close(v_gain("v", alpha, sigma), torch.ones_like(sigma), rtol=0, atol=1e-14)
    torch.testing.assert_close(v_gain("flow", *flow_levels()), torch.ones(400).double(), rtol=0, atol=1e-14)
