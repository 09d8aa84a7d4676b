"""One update: warm-up, clipping, and the average of the weights."""

import pytest
import torch
from accelerate import Accelerator
from training_kit import adapt, run

from domainstudio.training.config import TrainConfig
from domainstudio.training.optimisation import Training, ema_decay

both = pytest.mark.parametrize("adapter", ["full", "lora"])


def start(models, adapter="full", **settings) -> Training:
    defaults = {"max_train_steps": 1000, "train_batch_size": 4, "learning_rate": 1e-2}
    config = TrainConfig(**{**defaults, **settings})
    return Training(adapt(models("pixel_epsilon"), adapter), config, Accelerator())


def a_loss(training: Training) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(training.step))
    return (training.adaptation.network(x, torch.tensor([5, 500])).sample - 1).square().mean()


def step(training: Training, loss: torch.Tensor | None = None) -> float:
    """One step; the gradient norm."""
    training.backward(a_loss(training) if loss is None else loss)
    return training.update()


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.0), (6, 0.0), (20, 2 / 3), (1000, 149 / 150), (10**9, 0.9999)])
def test_the_average_is_over_the_last_seventh_of_the_run(steps, decay):
    assert ema_decay(steps) == pytest.approx(decay, abs=1e-12)


@both
def test_the_average_against_its_recurrence_in_float64(models, adapter):
    training = start(models, adapter)
    expected = [p.detach().double() for p in training.parameters]
    for k in range(1, 5):
        step(training)
        decay = k / (k + 10)  # below 149 / 150 for so few steps
        expected = [
            decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, training.parameters, strict=True)
        ]
    for average, value in zip(training.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, p) for a, p in zip(training.average, training.parameters, strict=True))


def test_a_decay_of_ones_own_holds_from_the_first_step_on(models):
    training = start(models, ema_decay=0.9)
    expected = [p.detach().double() for p in training.parameters]
    for _ in range(3):
        step(training)
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, training.parameters, strict=True)]
    for average, value in zip(training.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)


def test_a_very_short_run_ends_with_its_last_weights(models):
    training = start(models, max_train_steps=6)
    step(training)
    assert all(torch.equal(a, p) for a, p in zip(training.average, training.parameters, strict=True))


@both
def test_averaged_weights_are_lent_and_given_back(models, adapter):
    training = start(models, adapter)
    for _ in range(3):
        step(training)
    own = [p.detach().clone() for p in training.parameters]
    average = [a.clone() for a in training.average]
    assert any(not torch.equal(a, o) for a, o in zip(average, own, strict=True))

    def use():
        with training.averaged() as network:
            assert network is training.adaptation.network
            assert all(torch.equal(p, a) for p, a in zip(training.parameters, average, strict=True))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert all(torch.equal(p, o) for p, o in zip(training.parameters, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(training.average, average, strict=True))
    step(training)


def test_without_an_average_the_weights_are_the_students(models):
    training = start(models, use_ema=False)
    step(training)
    assert training.average == []
    assert training.state().average == []
    own = [p.detach().clone() for p in training.parameters]
    with training.averaged():
        assert all(torch.equal(p, o) for p, o in zip(training.parameters, own, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(training.parameters, own, strict=True))


@pytest.mark.parametrize(("warmup", "factors"), [(0, [1, 1, 1]), (1, [1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1])])
def test_the_learning_rate_warms_up_linearly(models, warmup, factors):
    rates = []

    def note(event):
        if event.metrics:
            rates.append(event.state().optimizer["param_groups"][0]["lr"])

    model = models("pixel_epsilon")
    run(model, adapt(model, "full"), steps=len(factors), observers=[note], lr_warmup_steps=warmup, learning_rate=0.008)
    assert rates == pytest.approx([0.008 * factor for factor in factors])


def test_the_first_update_is_adams_with_the_warm_rate_and_decay(models):
    """After one step Adam moves by lr * g / (|g| + eps), whatever clipping made of g's size."""
    training = start(models, lr_warmup_steps=10, weight_decay=0.1)
    before = [p.detach().double() for p in training.parameters]
    loss = a_loss(training)
    gradients = [g.double() for g in torch.autograd.grad(loss, training.parameters, retain_graph=True)]
    step(training, loss)
    rate, norm = 1e-2 / 10, torch.cat([g.flatten() for g in gradients]).norm()
    for old, g, new in zip(before, gradients, training.parameters, strict=True):
        clipped = g * min(1.0, 1.0 / norm)
        expected = old * (1 - rate * 0.1) - rate * clipped / (clipped.abs() + 1e-8)
        sure = clipped.abs() > 1e-4  # the sign of a smaller one may be rounding
        torch.testing.assert_close(new.detach().double()[sure], expected[sure], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_the_norm_told_is_the_one_before_clipping_to_the_limit(models, limit):
    training = start(models, max_grad_norm=limit)
    loss = a_loss(training)
    gradients = torch.autograd.grad(loss, training.parameters, retain_graph=True)
    norm = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert step(training, loss) == pytest.approx(norm, rel=1e-4)
    first_moments = [state["exp_avg"] for state in training.optimizer.state_dict()["state"].values()]
    used = torch.cat([m.double().flatten() for m in first_moments]).norm().item() / 0.1
    assert used == pytest.approx(min(norm, limit), rel=1e-3)
