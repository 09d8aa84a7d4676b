import pytest
import torch
from diffusers import DDPMScheduler

from domainstudio.diffusion.schedule import DiscreteSchedule, FlowSchedule, add_noise, over


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_noising_is_that_of_diffusers(beta_schedule, generator):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    t = torch.arange(1000)
    x0, noise = torch.randn(2, len(t), 3, 2, 2, generator=generator, dtype=torch.float64)
    ours = add_noise(x0, noise, *DiscreteSchedule(scheduler.alphas_cumprod).levels(t))
    torch.testing.assert_close(ours, scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-14)


def test_discrete_levels_preserve_the_variance_and_follow_the_order_asked_for():
    products = torch.linspace(1, 1e-3, 50, dtype=torch.float64)
    t = torch.tensor([49, 0, 7, 7])
    alpha, sigma = DiscreteSchedule(products).levels(t)
    torch.testing.assert_close(alpha.square(), products[t], rtol=1e-14, atol=0)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(4).double(), rtol=0, atol=1e-15)
    assert (alpha[1], sigma[1]) == (1, 0)


@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_flow_levels(num_train_timesteps):
    s = torch.tensor([0, 0.25, 0.5, 1]).double()
    alpha, sigma = FlowSchedule(num_train_timesteps).levels(s * num_train_timesteps)
    assert alpha.tolist() == [1, 0.75, 0.5, 0]
    assert sigma.tolist() == [0, 0.25, 0.5, 1]


def test_discrete_times_are_whole_and_cover_every_step(generator):
    t = DiscreteSchedule(torch.linspace(1, 0.1, 10)).sample_t(2000, generator)
    assert t.shape == (2000,)
    assert t.dtype == torch.int64
    counts = t.bincount(minlength=10)
    assert len(counts) == 10
    assert counts.min() > 140  # 200 expected, standard deviation 13
    assert counts.max() < 260


@pytest.mark.parametrize("schedule", [DiscreteSchedule(torch.linspace(1, 0.1, 1000)), FlowSchedule()])
@pytest.mark.parametrize("num", [1, 7, 10])
def test_the_times_of_a_batch_are_spread_evenly_in_random_order(schedule, num, generator):
    """One in each of `num` equal parts of the range, wherever the parts begin; so their mean hardly varies."""
    draws = torch.stack([schedule.sample_t(num, generator).double() for _ in range(400)])
    gaps = draws.sort(1).values.diff(dim=1)
    assert ((gaps - 1000 / num).abs() <= 1.01).all()
    if num > 1:
        first = draws.argmin(1).bincount(minlength=num)
        assert (first > 0).all(), "no place of the batch is always the least noised"
    counts = (draws / 250).long().flatten().bincount(minlength=4)
    assert ((counts - 100 * num).abs() < 60 + 10 * num).all(), "every time is as likely"


def test_flow_times_are_uniform_over_the_range(generator):
    t = FlowSchedule().sample_t(2000, generator)
    assert t.shape == (2000,)
    assert t.is_floating_point()
    assert t.min() >= 0
    assert t.max() < 1000
    counts = (t / 100).long().bincount(minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


@pytest.mark.parametrize("schedule", [DiscreteSchedule(torch.linspace(1, 0.1, 1000)), FlowSchedule()])
def test_times_depend_on_the_generator_alone(schedule):
    def draw(seed):
        return schedule.sample_t(64, torch.Generator().manual_seed(seed))

    first = draw(3)
    torch.rand(5)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    schedule.sample_t(64, generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generator.get_state(), before)


def test_add_noise_uses_each_picture_its_own_level():
    x0, noise = torch.full((2, 1, 1, 2), 2.0).double(), torch.full((2, 1, 1, 2), 10.0).double()
    x_t = add_noise(x0, noise, torch.tensor([1.0, 0.5]).double(), torch.tensor([0, 0.25]).double())
    assert x_t.flatten(1).tolist() == [[2, 2], [3.5, 3.5]]


def test_over_appends_dimensions():
    values = torch.arange(3.0)
    assert over(values, torch.zeros(3)).shape == (3,)
    assert over(values, torch.zeros(3, 2, 4, 5)).shape == (3, 1, 1, 1)
