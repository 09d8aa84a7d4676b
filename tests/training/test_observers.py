import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from training_kit import adapt, run

from domainstudio.data.domain import to_pil
from domainstudio.models.sample import decode, sample
from domainstudio.training.observers import Checkpoints, MetricsLog, SampleSheets, read_metrics
from domainstudio.training.state import TrainState, list_checkpoints, load_checkpoint
from domainstudio.training.train import StepEvent


def event(step, metrics=None, network=None):
    if metrics is None:
        metrics = {"loss": 1.0 / step}
    state = TrainState(step, {"w": torch.full((2,), float(step))})
    return StepEvent(step, metrics, lambda: state, lambda: nullcontext(network))


def start(step, network=None):
    return event(step, {}, network)


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_the_log_has_a_record_a_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert read_metrics(log.path) == []
    log(start(0))
    for step in (1, 2):
        log(event(step))
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
    ]


@pytest.mark.parametrize("resumed", [0, 2, 5])
def test_resuming_drops_the_steps_that_are_done_again(tmp_path, resumed):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log(start(0))
    for step in range(1, 6):
        log(event(step))
    again = MetricsLog(path)
    again(start(resumed))
    assert steps(path) == list(range(1, resumed + 1))
    again(event(resumed + 1, {"loss": 9.0}))
    assert read_metrics(path)[-1] == {"step": resumed + 1, "loss": 9.0}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cut_off_last_line_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert steps(path) == [1]
    log = MetricsLog(path)
    log(start(1))
    log(event(2))
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


@pytest.fixture
def sheets(models, tmp_path):
    model = models("latent_v")
    made = SampleSheets(tmp_path / "samples", model, num_images=3, every=2, last=5, seed=1, num_inference_steps=2)
    return made, model.network


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def test_sheets_are_made_before_the_first_step_every_n_and_at_the_end(sheets):
    make, network = sheets
    make(start(0, network))
    assert [p.name for p in make.folder.iterdir()] == ["step_000000"]
    for step in range(1, 6):
        make(event(step, network=network))
    names = sorted(p.name for p in make.folder.iterdir())
    assert names == ["step_000000", "step_000002", "step_000004", "step_000005"]
    sheet = make.folder / "step_000004"
    assert sorted(p.name for p in sheet.iterdir()) == ["000.png", "001.png", "002.png"]
    assert pictures(sheet)[0].shape == (32, 32, 3)


def test_sheets_come_from_the_same_noise_every_time(sheets):
    make, network = sheets
    make(start(0, network))
    torch.randn(3)
    make(event(2, network=network))
    first, second = pictures(make.folder / "step_000000"), pictures(make.folder / "step_000002")
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)), "only the weights may differ"
    assert not np.array_equal(first[0], first[1])
    expected = to_pil(decode(make.model, sample(make.model, network, 3, seed=1, num_inference_steps=2)))
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, expected, strict=True))


def test_resuming_does_not_make_a_sheet_again_but_replaces_a_step_done_again(sheets):
    make, network = sheets
    make(event(2, network=network))
    mark = make.folder / "step_000002" / "mark"
    mark.touch()
    make(start(2, network))
    assert mark.exists()
    make(start(3, network))
    assert not (make.folder / "step_000003").exists()
    make(event(2, network=network))
    assert not mark.exists()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_sheets_show_the_averaged_weights_and_leave_training_alone(models, tmp_path, adapter):
    def go(folder, every):
        model, drawn = models("pixel_dropout"), []
        adaptation = adapt(model, adapter)
        sheets = SampleSheets(folder, model, 2, every, last=3, seed=0, num_inference_steps=2)

        def draw(event):
            assert adaptation.network.training
            if event.step == 3:
                drawn.append(to_pil(decode(model, sample(model, adaptation.network, 2, 0, 2))))
                with event.averaged() as network:
                    drawn.append(to_pil(decode(model, sample(model, network, 2, 0, 2))))

        settings = {"steps": 200, "learning_rate": 1e-2}  # a long run, so that its average is not its last weights
        with pytest.raises(InterruptedError):
            run(model, adaptation, "domainstudio", observers=[sheets, draw, _stop_at(3)], **settings)
        own, averaged = ([np.asarray(image) for image in images] for images in drawn)
        shown = pictures(folder / "step_000003")
        assert all(np.array_equal(a, b) for a, b in zip(shown, averaged, strict=True))
        assert not np.array_equal(shown[0], own[0])
        assert not np.array_equal(shown[0], pictures(folder / "step_000000")[0])
        return adaptation.parameters()

    often, seldom = go(tmp_path / "often", 1), go(tmp_path / "seldom", 100)
    assert all(torch.equal(p, q) for p, q in zip(often, seldom, strict=True))


def test_checkpoints_come_every_n_and_at_the_end(tmp_path):
    save = Checkpoints(tmp_path, every=3, last=8, total_limit=None)
    save(start(0))
    assert list_checkpoints(tmp_path) == []
    for step in range(1, 9):
        save(event(step))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 6, 8]
    assert load_checkpoint(tmp_path / "checkpoint-6").student["w"].tolist() == [6, 6]


def test_resuming_at_a_checkpoint_does_not_write_it_again(tmp_path):
    save = Checkpoints(tmp_path, every=3, last=8, total_limit=1)
    save(event(3))
    mark = tmp_path / "checkpoint-3" / "mark"
    mark.touch()
    save(start(3))
    assert mark.exists()
    save(event(6))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6]


def test_saved_weights_are_the_students_beside_its_average(models, tmp_path):
    model = models("pixel_epsilon")
    with pytest.raises(InterruptedError):
        run(model, adapt(model, "full"), steps=50, observers=[Checkpoints(tmp_path, 2, 50, None), _stop_at(2)])
    saved = load_checkpoint(tmp_path / "checkpoint-2")
    own = dict(model.network.named_parameters())
    assert all(torch.equal(saved.student[name], p) for name, p in own.items())
    assert any(not torch.equal(a, p) for a, p in zip(saved.average, own.values(), strict=True))


def _stop_at(step):
    def stop(event):
        if event.step == step:
            raise InterruptedError

    return stop
