"""What the doctor says is measured, adds up, and leaves nothing behind."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from command_line import FAST, domainstudio, flags, succeeds, tree
from text_settings import FAST_TEXT

from domainstudio.app import doctor
from domainstudio.app.doctor import GB, Change, Diagnosis, applicable, diagnose
from domainstudio.app.memory import Peak, standing_bytes
from domainstudio.app.probe import Cost, Facts, Probe, probe, probe_apart
from domainstudio.app.recipe import build_recipe
from domainstudio.errors import UserError

pytest_plugins = ("text_kit",)
CPU = torch.device("cpu")
PICTURES = Facts("CPU, 1 thread", False, None, True, False, True, True, "model", 100, 300)
COST = Cost(
    **{"weights_bytes": 2 * GB, "step_bytes": 6 * GB, "preview_bytes": 3 * GB, "loading_seconds": 3.0},
    **{"source_samples_seconds": 20.0, "step_seconds": 0.5, "timed_steps": 4, "preview_seconds": 4.0},
    **{"watch_start_seconds": 1.0, "watch_seconds": 2.0},
)
DONE = {"mixed_precision": "bf16", "gradient_checkpointing": True, "adapter": "lora", "train_batch_size": 3}
"""Leaves nothing to change where pairs are formed of training pictures."""


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Two timed steps."""
    monkeypatch.setattr("domainstudio.app.probe.TIMED_SECONDS", 0)


def recipe(**settings):
    return build_recipe(None, {"instance_data_dir": "bundled:ink", **settings})


@pytest.fixture
def tiny(pipelines, pictures, tmp_path):
    """A recipe that takes a moment."""

    def build(pipeline: str = "pixel_epsilon", **settings):
        given = {"pretrained_model_name_or_path": str(pipelines(pipeline)), "instance_data_dir": str(pictures)}
        return recipe(**{**FAST, **given, "output_dir": str(tmp_path / "run"), **settings})

    return build


def replies(*costs):
    """Stands in for measuring: what to say of the recipe and of each change in turn."""
    said = iter(costs)
    return lambda asked: Probe(PICTURES, next(said))


class TestMemory:
    def test_the_peak_is_what_stood_and_what_came_at_once(self):
        kept = torch.zeros(3, 2**20)
        with Peak(CPU) as peak:
            before = standing_bytes(CPU)
            for _ in range(2):
                first = torch.zeros(5 * 2**20)
                second = first + 1
                del first, second
        assert peak.bytes - before == pytest.approx(2 * 5 * 2**22, rel=0.01)
        assert before >= kept.nbytes

    def test_views_are_counted_once(self):
        before = standing_bytes(CPU)
        whole = torch.zeros(2**20)
        views = [whole[index:] for index in range(4)]
        assert standing_bytes(CPU) - before == whole.nbytes == views[0].nbytes

    def test_other_devices_are_refused(self):
        with pytest.raises(UserError, match="this device is meta"):
            standing_bytes(torch.device("meta"))


class TestProbe:
    def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(self, tiny):
        def step(**settings):
            cost = probe(tiny(method="finetune", num_class_images=None, pair_batch_size=10, **settings)).cost
            return cost.step_bytes - cost.weights_bytes

        few, many = step(train_batch_size=4), step(train_batch_size=10)
        assert few < many < 3 * few
        assert step(train_batch_size=10, gradient_checkpointing=True) < 0.8 * many

    def test_weights_are_the_student_the_source_and_the_average(self, tiny, models):
        own = sum(p.nbytes for p in models("pixel_epsilon").network.parameters())
        cost = probe(tiny(random_flip=False)).cost
        assert 3 * own < cost.weights_bytes < 3.5 * own
        assert cost.peak_bytes == max(cost.step_bytes, cost.preview_bytes, cost.source_samples_bytes)
        assert cost.step_bytes > cost.weights_bytes + 3 * own  # gradients and AdamW's two averages

    def test_the_watch_is_measured_with_the_preview(self, tiny, stubs):
        cost = probe(tiny(watch=True)).cost
        assert min(cost.watch_start_seconds, cost.watch_seconds) > 0
        assert cost.notes == []

    def test_a_watch_that_cannot_see_is_told(self, tiny, stubs):
        [note] = probe(tiny(watch=True, num_validation_images=1)).cost.notes
        assert "nothing will watch this run" in note

    @pytest.mark.parametrize("erase_steps", [0, 2])
    def test_text_models(self, tiny, text_pipelines, erase_steps):
        settings = {**FAST_TEXT, "pretrained_model_name_or_path": str(text_pipelines("sd1_epsilon"))}
        found = probe(tiny(**settings, method="dreambooth", erase_steps=erase_steps, train_text_encoder=True))
        assert found.facts.is_text
        assert found.cost.source_samples_seconds > 0

    def test_memory_that_runs_out_is_no_crash(self, tiny, monkeypatch):
        def full(*_, **__):
            raise torch.OutOfMemoryError

        monkeypatch.setattr("domainstudio.app.opened.train", full)
        assert probe(tiny()).cost is None

    def test_a_killed_child_is_memory_that_ran_out(self, tiny, monkeypatch):
        said = json.dumps({"facts": asdict(PICTURES)})

        def ended(code, out):
            done = subprocess.CompletedProcess([], code, out, "a traceback")
            monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
            return probe_apart(tiny())

        assert ended(-9, said) == Probe(PICTURES, None)
        with pytest.raises(UserError, match=r"memory ran out while .*pixel_epsilon was read"):
            ended(-9, "")
        with pytest.raises(UserError, match="no such pictures"):
            ended(0, json.dumps({"error": "no such pictures"}))
        with pytest.raises(RuntimeError, match="a traceback"):
            ended(1, said)


class TestApplicable:
    @pytest.mark.parametrize("changed", range(4))
    def test_what_the_recipe_has_is_not_named(self, changed):
        left = {name: value for index, (name, value) in enumerate(DONE.items()) if index != changed}
        [option] = applicable(recipe(**left, pairing="training"), replace(PICTURES, needs_prior=False))
        assert next(iter(option)) == list(DONE)[changed]
        assert applicable(recipe(**DONE, pairing="training"), replace(PICTURES, needs_prior=False)) == []

    def test_batches_are_halved_as_far_as_pairs_allow(self):
        accumulated = {"gradient_accumulation_steps": 4}
        given = recipe(**{**DONE, "train_batch_size": 8}, pair_batch_size=4, gradient_accumulation_steps=2)
        assert applicable(given, PICTURES) == [{"train_batch_size": 4, "pair_batch_size": 3, **accumulated}]
        assert applicable(recipe(**{**DONE, "train_batch_size": 1}, pair_batch_size=3), PICTURES) == []

    def test_image_terms_move_only_where_there_is_a_decoder(self):
        given = recipe(**DONE, pairing="training")
        facts = replace(PICTURES, needs_prior=False, space="pixel")
        assert applicable(given, facts) == [{"space": "crop"}]
        assert applicable(given, replace(facts, is_latent=False)) == []

    def test_lora_comes_with_a_learning_rate_of_its_own(self):
        facts = replace(PICTURES, needs_prior=False)
        given = {**DONE, "adapter": "full", "pairing": "training"}
        assert applicable(recipe(**given), facts) == [{"adapter": "lora"}]
        assert applicable(recipe(**given, learning_rate=1e-5), facts) == [{"adapter": "lora", "learning_rate": 1e-3}]

    def test_cards_without_bf16_are_told_of_fp16(self):
        facts = replace(PICTURES, has_bf16=False, is_cuda=True)
        assert applicable(recipe(), facts)[0] == {"mixed_precision": "fp16"}


class TestDiagnosis:
    def test_parts_add_up(self):
        found = Diagnosis(recipe(max_train_steps=120), PICTURES, Change({}, True, COST), ())
        assert found.num_previews == 4  # steps 0, 50, 100, 120
        parts = {"loading": 3, "source_samples": 20, "steps": 60, "previews": 16, "watch": 9}
        assert found.seconds == {**parts, "total": 108}
        assert (
            "about 2 min: loading 3 s, up to 300 source samples 20 s, 120 steps 60 s, 4 previews 16 s" in found.render()
        )

    def test_what_is_not_counted_is_said(self):
        asked = recipe(erase_steps=5, stop_when_overfitting=True)
        told = Diagnosis(asked, PICTURES, Change({}, True, COST), ()).render()
        for part in ("not counted: writing checkpoints", "erase_steps", "an earlier end by the watch"):
            assert part in told

    def test_cards_take_the_fewest_changes_that_fit(self):
        small = replace(COST, step_bytes=4 * GB)
        changes = (Change({"adapter": "lora", "rank": 1}, True, small), Change({"space": "crop"}, True, small))
        found = Diagnosis(recipe(), PICTURES, Change({}, True, COST), changes)
        assert [way.settings for way in found.cards().values()] == [{"space": "crop"}, {}, {}, {}, {}]
        found = Diagnosis(recipe(), PICTURES, Change({}, True, replace(COST, step_bytes=11 * GB)), ())
        assert list(found.cards().values())[:3] == [None] * 3  # 11 GB, a tenth and half a GB are not 12
        assert "16, 24 GB: as it is" in found.render()
        reserved = replace(COST, reserved_bytes=23 * GB)
        assert list(Diagnosis(recipe(), PICTURES, Change({}, True, reserved), ()).cards().values())[3] is None

    def test_only_what_helped_is_named_and_then_tried_together(self):
        less, faster = replace(COST, step_bytes=5 * GB), replace(COST, step_seconds=0.4)
        both = replace(less, step_seconds=0.4)
        found = diagnose(recipe(), measure=replies(COST, faster, less, COST, COST, both))
        titles = ["mixed_precision bf16", "gradient_checkpointing true"]
        assert [change.title for change in found.helpful()] == [*titles, ", ".join(titles)]
        assert "adapter" not in found.render()
        assert [change["helps"] for change in found.to_json()["changes"]] == [True, True, False, False, True]

    def test_nothing_that_helps_is_said(self):
        found = diagnose(recipe(), measure=replies(*[COST] * 5))
        assert "none of those tried takes less" in found.render()

    def test_what_does_not_run_at_all_gets_every_change_at_once(self):
        found = diagnose(recipe(), measure=replies(None, None, None, None, None, COST))
        assert len(found.changes[-1].settings) == 6
        assert found.seconds == {}
        assert found.cards()[8] == found.changes[-1]
        for part in ("more than this machine has", "does not fit", "8, 12, 16, 24 GB: mixed_precision bf16"):
            assert part in found.render()

    def test_a_slow_machine_names_changes_untried(self, monkeypatch):
        monkeypatch.setattr(doctor, "TRY_SECONDS", -1)
        found = diagnose(recipe(), measure=replies(COST))
        assert not any(change.tried for change in found.changes)
        assert "adapter lora: not tried" in found.render()

    def test_a_change_that_is_refused_is_left_out(self):
        def measure(asked):
            if asked.mixed_precision != "no":
                raise UserError("the loss is nan")
            return Probe(PICTURES, COST)

        titles = [change.title for change in diagnose(recipe(), measure=measure).changes]
        assert titles[0] == "gradient_checkpointing true"


class TestCommand:
    def test_one_json_object_and_nothing_written(self, tiny, tmp_path, monkeypatch, pictures):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(doctor, "TRY_SECONDS", 0)
        given, before = tiny(**{**DONE, "mixed_precision": "no"}, pairing="training"), tree(pictures)
        (tmp_path / "recipe.toml").write_text(given.to_toml())
        result = succeeds("doctor", "recipe.toml", "--json", "--max-train-steps", 7)
        found = json.loads(result.out)
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
        assert tree(pictures) == before
        assert found["recipe"]["cost"]["timed_steps"] >= 2
        assert found["recipe"]["cost"]["weights_bytes"] < found["recipe"]["cost"]["step_bytes"]
        assert found["seconds"]["steps"] == pytest.approx(7 * found["recipe"]["cost"]["step_seconds"])
        assert found["cards"] == {str(size): {} for size in (6, 8, 12, 16, 24)}
        assert [(change["settings"], change["tried"]) for change in found["changes"]] == [
            ({"mixed_precision": "bf16"}, False)
        ]
        here = probe(given).cost
        assert found["recipe"]["cost"]["weights_bytes"] == pytest.approx(here.weights_bytes, rel=0.02)
        assert found["recipe"]["cost"]["step_bytes"] == pytest.approx(here.step_bytes, rel=0.02)
        assert (here.process_bytes is None) == (sys.platform != "linux")

    def test_mistakes_are_told_as_train_tells_them(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr("domainstudio.app.doctor.diagnose", lambda asked, told: diagnose(asked, told, probe))
        for changes in ({"instance_data_dir": str(tmp_path / "no")}, {"resolution": 64}, {"rank": 0}):
            given = flags(**{**FAST, **json.loads(tiny().model_dump_json(exclude_none=True)), **changes})
            here, there = domainstudio("doctor", *given), domainstudio("train", *given)
            assert (here.code, here.out) == (there.code, there.out) == (2, "")
            assert here.err[here.err.index("error: ") :] == there.err[there.err.index("error: ") :]
            assert not (tmp_path / "run").exists()

    def test_a_taken_output_dir_is_no_matter(self, tiny, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("kept")
        assert probe(tiny()).cost is not None
        assert tree(tmp_path / "run") == {"mine.txt": b"kept"}
