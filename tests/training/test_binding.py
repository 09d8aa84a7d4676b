"""Binding: what it compares, that it ties a style to a new word, and that a resumed run is the uninterrupted one."""

from contextlib import contextmanager

import pytest
import torch
from training_kit import Log, perturb, same

from domainstudio.errors import UserError
from domainstudio.models.adaptation import FullAdaptation, LoraAdaptation
from domainstudio.training.binding import HOLD_WEIGHT, Binding, binding_loss
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import build_objective, finetune
from domainstudio.training.objective import Batch, Prompts
from domainstudio.training.observers import Checkpoints
from domainstudio.training.state import load_checkpoint
from domainstudio.training.train import train

pytest_plugins = "text_kit"

WORD = "<ink>"
SOURCES = ["a portrait", "a dog", "red hair"]
TARGETS = [f"{prompt}, {WORD}" for prompt in SOURCES]
OTHERS = ["green three house", "winter"]

both = pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])


def told(model, targets, sources) -> Prompts:
    return Prompts(model.encode_prompts(targets), model.encode_prompts(sources))


def binding_of(model) -> Binding:
    return Binding(told(model, [WORD], [""]), told(model, [f"{text}, {WORD}" for text in OTHERS], OTHERS))


def adapted(text_models, name="sd1_epsilon", adapter="lora", seed=0):
    model = text_models(name)
    model.add_identifier(WORD)
    model = model.with_text_encoder(WORD if adapter == "lora" else None)
    if adapter == "full":
        return model, FullAdaptation(model.network)
    return model, LoraAdaptation(model.network, 4, 4.0, seed=seed)


def batch_of(model, num=3) -> Batch:
    x0 = torch.randn(num, *model.sample_shape, generator=torch.Generator().manual_seed(3))
    rows = [row % 3 for row in range(num)]
    return Batch(x0, told(model, [TARGETS[row] for row in rows], [SOURCES[row] for row in rows]))


def test_pictures_are_told_the_same_with_and_without_the_word(text_models):
    model, _ = adapted(text_models)
    batch, binding = batch_of(model, 600), binding_of(model)
    with_it, without = binding.told(batch.prompts, torch.Generator().manual_seed(0))
    counts = dict.fromkeys(("own", "unnamed", "other"), 0)
    pairs = {
        "unnamed": [binding.unnamed],
        "other": [binding.others[[0]], binding.others[[1]]],
        "own": [batch.prompts[[row]] for row in range(3)],
    }
    for row in range(600):
        kind = [
            kind
            for kind, options in pairs.items()
            if any(torch.equal(with_it[[row]], o.student) and torch.equal(without[[row]], o.source) for o in options)
        ]
        assert len(kind) == 1
        counts[kind[0]] += 1
    assert 90 < counts["unnamed"] < 150
    assert 90 < counts["other"] < 150
    own = [torch.equal(without[row], batch.prompts.source[row]) for row in range(600)]
    assert sum(own) >= counts["own"], "what is not replaced stays with its picture"


@both
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_loss_is_the_distance_to_both_teachers(text_models, name, adapter):
    model, adaptation = adapted(text_models, name, adapter)
    perturb(adaptation)
    before = [p.detach().clone() for p in adaptation.parameters()]
    _, taught = adapted(text_models, name, adapter, seed=5)
    perturb(taught, 0.05)
    taught.network.eval()

    @contextmanager
    def of_teacher():
        with torch.no_grad():
            yield taught.network

    binding, batch = binding_of(model), batch_of(model)
    adaptation.network.eval()
    loss, parts = binding_loss(model, adaptation, of_teacher, binding, batch, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)  # the same, written out
    target, plain = binding.told(batch.prompts, generator)
    noise = torch.randn(batch.x0.shape, generator=generator)
    t = model.schedule.sample_t(3, generator)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in model.schedule.levels(t))
    x_t = alpha * batch.x0 + sigma * noise
    with torch.no_grad():
        says = [adaptation.network(x_t, t, prompts).sample for prompts in (target, plain)]
        wanted = taught.network(x_t, t, target).sample
        with adaptation.source() as network:
            source = network(x_t, t, plain).sample
    bind, hold = (says[0] - wanted).square().mean(), (says[1] - source).square().mean()
    torch.testing.assert_close(parts["bind"], bind)
    torch.testing.assert_close(parts["hold"], hold)
    torch.testing.assert_close(loss.detach(), bind + HOLD_WEIGHT * hold)
    gap = wanted - source
    torch.testing.assert_close(parts["bound"], ((says[0] - says[1]) * gap).sum() / gap.square().sum())
    assert all(torch.equal(p, q) for p, q in zip(adaptation.parameters(), before, strict=True))


def go(text_models, steps, binding_steps, observers=(), resume=None, adapter="lora", seed=0, **settings):
    model, adaptation = adapted(text_models, adapter=adapter, seed=seed)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    config = {"train_batch_size": 4, "pair_batch_size": 4, "learning_rate": 3e-3, **settings}
    run = train(
        model,
        adaptation,
        images,
        build_objective("studio", model),
        TrainConfig(steps, binding_steps=binding_steps, **config),
        batch_of(model, 6),
        told(model, TARGETS, SOURCES),
        observers,
        resume,
        binding=binding_of(model),
    )
    return model, run


def test_a_style_is_bound_to_the_word(text_models):
    log = Log()
    go(text_models, 130, 90, [log], learning_rate=1e-2)
    learning, binding = log.metrics[:40], log.metrics[40:]
    assert all("simple" in metrics and "bind" not in metrics for metrics in learning)
    assert all(metrics.keys() == {"loss", "bind", "hold", "bound", "grad_norm"} for metrics in binding)
    assert abs(binding[0]["bind"]) < 1e-8, "it begins as what it has learned"
    assert binding[0]["hold"] > 0

    def late(name):
        return sum(metrics[name] for metrics in binding[-20:]) / 20

    assert late("bound") > 0.3 > 5 * abs(binding[0]["bound"])
    assert late("hold") < 0.6 * binding[0]["hold"]


def test_low_precision_keeps_student_and_teacher_apart(text_models):
    model, run = go(text_models, 3, 1)
    with torch.no_grad():
        for p in run.parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss, parts = binding_loss(
                model, run.adaptation, run.before_binding, binding_of(model), batch_of(model), generator
            )
        loss.backward()
        size = torch.stack([p.grad.norm() for p in run.parameters]).norm()
        found.append([loss.item(), parts["bind"].item(), size.item()])
        run.optimizer.zero_grad()
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert min(found[0]) > 0.01


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(text_models, tmp_path, adapter, step):
    whole = Log()
    _, first = go(text_models, 6, 3, [whole, Checkpoints(tmp_path, 1, 6, None)], adapter=adapter)
    saved = load_checkpoint(tmp_path / f"checkpoint-{step}")
    assert bool(saved.taught) == (step > 3)
    resumed = Log()
    _, second = go(text_models, 6, 3, [resumed], saved, adapter, seed=9)
    assert resumed.metrics == whole.metrics[step:]
    assert same(first.average, second.average)
    assert same(first.taught, second.taught)


def test_rates_of_the_embedding_and_of_binding(text_models):
    rates = []

    def watch(event):
        if event.metrics:
            groups = event.state().optimizer["param_groups"]
            rates.append([group["lr"] for group in groups])
            assert [group["weight_decay"] for group in groups] == [0.01, 0.0]

    go(text_models, 6, 4, [watch])
    expected = [3e-3] * 2 + [2 * 3e-3 * (1 - step / 4) for step in range(4)]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [word for _, word in rates] == pytest.approx([5 * rate for rate in expected])


def test_source_samples_are_needed(text_models):
    model, adaptation = adapted(text_models)
    images = torch.zeros(3, 3, 16, 16)
    config = TrainConfig(4, 3, 1e-3, binding_steps=2)
    with pytest.raises(UserError, match="source samples missing"):
        train(model, adaptation, images, finetune(model), config, None, told(model, TARGETS, SOURCES))
