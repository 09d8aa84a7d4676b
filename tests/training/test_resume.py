import pytest
import torch
from training_kit import Log, adapt, run, same

from domainstudio.errors import UserError
from domainstudio.training.observers import Checkpoints
from domainstudio.training.state import list_checkpoints, load_checkpoint

CASES = [
    ("pixel_dropout", "full", "domainstudio", {}),
    ("pixel_dropout", "lora", "studio", {"random_flip": True}),
    ("pixel_learned", "full", "domainstudio_released", {"random_flip": True}),
    ("latent_v", "full", "studio", {"lr_warmup_steps": 3}),
    ("latent_flow", "lora", "finetune", {"use_ema": False}),
    ("pixel_v", "lora", "ddpm_pa", {"mixed_precision": "bf16"}),
]


@pytest.mark.parametrize(("name", "adapter", "method", "settings"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one(models, fresh_accelerate, tmp_path, name, adapter, method, settings):
    settings = {"steps": 30, "lr_warmup_steps": 3, **settings}  # 30 steps: an average that is not the last weights

    class Stop(Exception):
        pass

    def stop(event):
        if event.step == 4:
            raise Stop

    def go(resume, seed):
        model, log = models(name), Log()
        adaptation = adapt(model, adapter, seed=seed)
        states = []
        observers = [log, Checkpoints(tmp_path, 2, 30, None), lambda event: states.append(event.state()), stop]
        with pytest.raises(Stop):
            run(model, adaptation, method, resume=resume, observers=observers, **settings)
        return states[-1], log

    whole, log = go(None, seed=0)
    saved = load_checkpoint(tmp_path / "checkpoint-2")
    assert saved.step == 2
    resumed, later = go(saved, seed=123)  # another seed: nothing of the first adapter may be needed
    assert later.steps == [2, 3, 4]
    assert later.metrics == log.metrics[2:]
    assert resumed.step == whole.step == 4
    assert same(resumed.student, whole.student)
    assert same(resumed.average, whole.average)
    assert same(resumed.optimizer, whole.optimizer)
    assert bool(whole.average) == settings.get("use_ema", True)
    assert whole.optimizer["state"]


def test_a_finished_run_resumes_to_nothing_left_to_do(models, tmp_path):
    model, log = models("pixel_epsilon"), Log()
    run(model, adapt(model, "full"), observers=[Checkpoints(tmp_path, 5, 2, None)])
    ((step, path),) = list_checkpoints(tmp_path)
    assert step == 2
    fresh = models("pixel_epsilon")
    result = run(fresh, adapt(fresh, "full"), observers=[log], resume=load_checkpoint(path))
    assert (result.step, log.steps) == (2, [2])
    assert all(torch.equal(p, q) for p, q in zip(model.network.parameters(), fresh.network.parameters(), strict=True))


def test_other_settings_than_the_checkpoints_are_refused(models, tmp_path):
    model = models("pixel_epsilon")
    run(model, adapt(model, "lora"), observers=[Checkpoints(tmp_path, 1, 2, None)])
    saved = load_checkpoint(tmp_path / "checkpoint-1")
    fresh = models("pixel_epsilon")
    with pytest.raises(UserError, match="disagree on use_ema"):
        run(fresh, adapt(fresh, "lora"), resume=saved, use_ema=False)
    other = models("latent_epsilon")
    with pytest.raises(UserError, match="belongs to another model"):
        run(other, adapt(other, "lora"), resume=saved)
