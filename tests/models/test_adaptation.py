import copy

import pytest
import torch
from diffusers import UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from domainstudio.errors import UserError
from domainstudio.models.adaptation import FullAdaptation, LoraAdaptation
from domainstudio.models.lora_files import read_lora, save_lora

FAMILIES = ["pixel_dropout", "latent_epsilon"]
both = pytest.mark.parametrize("adapter", ["full", "lora"])
families = pytest.mark.parametrize("name", FAMILIES)


def adapt(network, adapter, rank=4, seed=0):
    return FullAdaptation(network) if adapter == "full" else LoraAdaptation(network, rank, 8.0, seed)


def output(network, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 16, 16, generator=generator)
    return network(x, torch.tensor([10, 900])).sample


def train_a_little(adaptation, channels, steps=3):
    adaptation.network.train()
    optimizer = torch.optim.AdamW(adaptation.parameters(), lr=1e-2)
    for _ in range(steps):
        output(adaptation.network, channels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adaptation.network.eval()


@pytest.fixture(params=FAMILIES)
def original(request, models):
    return models(request.param).network


@both
def test_the_source_keeps_the_original_weights_bit_for_bit(original, adapter):
    channels = original.config.in_channels
    with torch.no_grad():
        expected = output(copy.deepcopy(original), channels)
    adaptation = adapt(original, adapter)
    with adaptation.source() as source:
        assert torch.equal(output(source, channels), expected)
    train_a_little(adaptation, channels)
    with torch.no_grad():
        assert (output(adaptation.network, channels) - expected).abs().max() > 1e-3, "the student has learned"
    adaptation.network.train()
    with adaptation.source() as source:
        assert torch.equal(output(source, channels), expected)


@both
def test_a_fresh_student_is_the_source(original, adapter):
    channels = original.config.in_channels
    adaptation = adapt(original, adapter)
    with adaptation.source() as source, torch.no_grad():
        expected = output(source, channels)
    with torch.no_grad():
        assert torch.equal(output(adaptation.network, channels), expected)


@both
def test_no_gradient_reaches_the_source(original, adapter):
    channels = original.config.in_channels
    adaptation = adapt(original, adapter)
    with adaptation.source() as source:
        x = torch.zeros(1, channels, 16, 16, requires_grad=True)
        assert not source(x, torch.tensor([3])).sample.requires_grad
        seen = output(source, channels)
        kept = None if adapter == "lora" else list(source.parameters())
    assert not seen.requires_grad
    (output(adaptation.network, channels) - seen).square().mean().backward()
    trained = {id(p) for p in adaptation.parameters()}
    frozen = kept or [p for p in adaptation.network.parameters() if id(p) not in trained]
    assert frozen
    assert all(p.grad is None for p in frozen)
    (output(adaptation.network, channels) - 1).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adaptation.parameters())


@both
@pytest.mark.parametrize("training", [True, False])
def test_the_students_training_mode_and_gradients_are_put_back(models, adapter, training):
    adaptation = adapt(models("pixel_dropout").network, adapter)
    adaptation.network.train(training)
    wanted = [p.requires_grad for p in adaptation.network.parameters()]

    def fail():
        with adaptation.source() as source:
            assert {m.training for m in source.modules()} == {False}
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert {m.training for m in adaptation.network.modules()} == {training}
    assert [p.requires_grad for p in adaptation.network.parameters()] == wanted
    train_a_little(adaptation, 3)
    with adaptation.source() as source, torch.no_grad():
        expected = output(source, 3)
    with torch.no_grad():
        assert not torch.equal(output(adaptation.network, 3), expected), "adapters are on again"


def test_a_full_source_is_frozen_and_in_eval_mode_whatever_it_was_copied_from(models):
    network = models("pixel_dropout").network.train().requires_grad_(True)
    with FullAdaptation(network).source() as source:
        assert {m.training for m in source.modules()} == {False}
        assert not any(p.requires_grad for p in source.parameters())
    assert network.training


def test_full_trains_everything_and_can_do_without_a_source(models):
    network = models("pixel_epsilon").network
    adaptation = FullAdaptation(network, keep_source=False)
    assert [id(p) for p in adaptation.parameters()] == [id(p) for p in network.parameters()]
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(AssertionError), adaptation.source():
        pass


@families
def test_lora_trains_its_adapters_and_nothing_else(models, name):
    model = models(name)
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    targets = {n for n, m in model.network.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    adaptation = LoraAdaptation(model.network, 4, 4.0, 0)
    wanted = {n for n, p in adaptation.network.named_parameters() if p.requires_grad}
    assert wanted == {n for n, _ in adaptation.network.named_parameters() if "lora_" in n}
    adapted = {n for n, m in adaptation.network.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == targets - {"conv_out"}
    assert any("to_q" in n for n in adapted)
    train_a_little(adaptation, model.sample_shape[0])
    for full_name, parameter in adaptation.network.named_parameters():
        if "lora_" not in full_name:
            assert torch.equal(parameter, before[full_name.replace(".base_layer", "")])


def test_a_lora_follows_from_its_seed_and_leaves_the_global_generator_alone(models):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (LoraAdaptation(models("pixel_epsilon").network, 4, 4.0, seed).state() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@both
def test_state_round_trip(original, adapter):
    channels = original.config.in_channels
    fresh = copy.deepcopy(original)
    adaptation = adapt(original, adapter)
    train_a_little(adaptation, channels)
    other = adapt(fresh, adapter, seed=9)
    other.load_state({n: t.clone() for n, t in adaptation.state().items()})
    with torch.no_grad():
        assert torch.equal(output(other.network, channels), output(adaptation.network, channels))
    assert all(torch.equal(p, q) for p, q in zip(adaptation.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in other.parameters())


def test_a_lora_of_another_rank_or_model_is_refused(models):
    adaptation = adapt(models("pixel_epsilon").network, "lora")
    for other in (
        adapt(models("pixel_epsilon").network, "lora", rank=2).state(),
        adapt(models("latent_epsilon").network, "lora").state(),
        dict(list(adaptation.state().items())[1:]),
        {},
    ):
        with pytest.raises(UserError, match="another rank, or belongs to another model"):
            adaptation.load_state(other)


def test_a_merged_copy_is_the_student_without_wrappers(original, tmp_path):
    channels, names = original.config.in_channels, set(original.state_dict())
    adaptation = LoraAdaptation(original, 4, 8.0, 0)
    train_a_little(adaptation, channels)
    with torch.no_grad():
        expected = output(adaptation.network, channels)
        merged = adaptation.merged()
        assert torch.equal(output(adaptation.network, channels), expected), "the student stays as it is"
        torch.testing.assert_close(output(merged.eval(), channels), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert set(merged.state_dict()) == names
    shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in adaptation.network.parameters()}
    assert not shared
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded = output(UNet2DModel.from_pretrained(tmp_path), channels)
    torch.testing.assert_close(reloaded, expected, rtol=1e-4, atol=1e-5)


def test_lora_scale_is_alpha_over_rank(models):
    """W + (alpha / rank) B A, against plain matrices."""
    network = models("pixel_epsilon").network
    name = "mid_block.attentions.0.to_q"
    weight = network.get_submodule(name).weight.detach().clone()
    adaptation = LoraAdaptation(network, 4, 6.0, 0)
    for parameter in adaptation.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {n: t.double() for n, t in adaptation.state().items()}
    low, high = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    merged = adaptation.merged().get_submodule(name).weight
    torch.testing.assert_close(merged.double(), weight.double() + 6 / 4 * high @ low, rtol=1e-5, atol=1e-6)


def test_saved_loras_come_back_with_their_metadata(models, tmp_path):
    adaptation = adapt(models("latent_epsilon").network, "lora")
    train_a_little(adaptation, 4)
    path = tmp_path / "lora.safetensors"
    save_lora(adaptation, path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "rank": "4", "lora_alpha": "8.0"}
    tensors, state = read_lora(path), adaptation.state()
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[n], state[n]) for n in state)
    other = adapt(models("latent_epsilon").network, "lora", seed=3)
    other.load_state(tensors)
    with torch.no_grad():
        assert torch.equal(output(other.network, 4), output(adaptation.network, 4))
