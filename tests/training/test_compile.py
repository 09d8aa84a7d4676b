"""Compiled networks (torch_compile): the same run, whatever the adapter; nothing is compiled again as it goes on."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from training_kit import Log, adapt, run

from domainstudio.models.adaptation import LoraAdaptation
from domainstudio.models.sample import sample


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Counts what is compiled; the graphs run as they are, since not every machine has a compiler."""
    counter, plain = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: plain(self, backend=counter, **given))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_compiled_run_is_the_same_run(models, compiled_graphs, adapter):
    counts = []

    def losses(compiled: bool) -> list[float]:
        model, log = models("pixel_v"), Log()
        adaptation = adapt(model, adapter)
        if compiled:
            adaptation.compile()

        def draw(event):
            counts.append(compiled_graphs.frame_count)
            with event.averaged() as network:
                sample(model, network, 5, 0, 2)
            assert compiled_graphs.frame_count == counts[-1], "pictures of other shapes were compiled for"

        run(model, adaptation, "studio", steps=4, observers=[log, draw])
        return log.losses

    plain = losses(compiled=False)
    assert set(counts) == {0}
    counts.clear()
    assert losses(compiled=True) == pytest.approx(plain, rel=1e-5)
    assert counts[0] == 0
    assert 0 < counts[1] == counts[-1], "student and source, once"


@pytest.mark.usefixtures("compiled_graphs")
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_compiled_student_keeps_its_names(models, adapter):
    adaptation = adapt(models("pixel_v"), adapter)
    names = list(adaptation.network.state_dict())
    adaptation.compile()
    assert list(adaptation.network.state_dict()) == names


def test_a_compiled_lora_is_merged_into_a_plain_network(models, compiled_graphs):
    model = models("pixel_v")
    adaptation = LoraAdaptation(model.network, rank=4, lora_alpha=4.0, seed=0)
    adaptation.compile()
    merged = adaptation.merged().eval()
    with torch.no_grad():
        merged(torch.zeros(1, *model.sample_shape), torch.tensor([3]))
    assert compiled_graphs.frame_count == 0, "the copy was compiled"
    assert set(merged.state_dict()) == set(models("pixel_v").network.state_dict())
