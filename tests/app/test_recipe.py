import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from command_line import FAST, domainstudio, flags
from pydantic import ValidationError

from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.errors import UserError

ODD_NAMES = [
    "plain",
    'a "quoted" name',
    "back\\slash\\n",
    "C:\\new\\table",
    "ünï/日本 画",
    "tab\there",
    "del\x7f",
    "'#'",
    "a\nb",
]


def problems(path: Path | None = None, **overrides) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe(path, overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize("name", ODD_NAMES)
def test_toml_reads_back_to_an_equal_recipe(name, write):
    recipe = Recipe(
        instance_data_dir=name,
        output_dir=name,
        use_ema=False,
        learning_rate=1.5e-7,
        lora_alpha=3,
        rank=2,
        pairing="training",
    )
    path = write(recipe.to_toml())
    assert build_recipe(path, {}) == recipe
    assert tomllib.loads(path.read_text(encoding="utf-8"))["instance_data_dir"] == name


def test_every_value_of_a_default_recipe_is_written_but_the_open_ones(write):
    recipe = Recipe(instance_data_dir="x")
    written = tomllib.loads(recipe.to_toml())
    assert written == {name: value for name, value in recipe.model_dump().items() if value is not None}
    assert build_recipe(write(recipe.to_toml()), {}) == recipe


def test_overrides_win_over_the_file(write):
    recipe = build_recipe(write('instance_data_dir = "a"\nrank = 4\nseed = 5\n'), {"seed": 6, "output_dir": "o"})
    assert (recipe.instance_data_dir, recipe.rank, recipe.seed, recipe.output_dir) == ("a", 4, 6, "o")


def test_flags_win_over_the_file_on_the_command_line(write, tmp_path, pipelines, pictures):
    old = Recipe(instance_data_dir=str(pictures), output_dir=str(tmp_path / "wrong"), seed=1, max_train_steps=9)
    given = {"output_dir": tmp_path / "run", "pretrained_model_name_or_path": pipelines("pixel_epsilon"), **FAST}
    given |= {"method": "finetune", "max_train_steps": 1, "use_ema": False}
    result = domainstudio("train", write(old.to_toml()), *flags(**given))
    assert result.code == 0, result.err
    kept = build_recipe(tmp_path / "run" / "config.toml", {})
    assert (kept.seed, kept.max_train_steps, kept.use_ema, kept.method) == (1, 1, False, "finetune")
    assert not (tmp_path / "wrong").exists()


def test_unknown_keys_are_refused_with_the_nearest_known_one(write):
    message = problems(write('instance_data_dir = "a"\nleraning_rate = 1e-4\nzzz = 1\n'))
    assert "leraning_rate: no such setting; did you mean learning_rate?" in message
    assert "zzz: no such setting" in message


def test_all_problems_are_told_at_once(write):
    message = problems(write('ranks = 3\nmethod = "studoi"\nmax_train_steps = 0\nuse_ema = "perhaps"\n'), seed=-1)
    for part in (
        "instance_data_dir: required",
        "ranks: no such",
        "did you mean rank?",
        "method = 'studoi'",
        "'studio'",
    ):
        assert part in message
    for part in ("max_train_steps = 0", "use_ema = 'perhaps'", "seed = -1"):
        assert part in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "domainstudio", "train_batch_size": 2}, "train_batch_size=2"),
        ({"pair_batch_size": 20, "num_class_images": 10}, "pair_batch_size=20"),
        ({"nearest_class_images": 9}, "is less than pair_batch_size=10"),
        (
            {"nearest_class_images": 301, "num_class_images": 300},
            "nearest_class_images=301 is more than num_class_images=300",
        ),
        ({"learning_rate": float("nan")}, "finite"),
        ({"learning_rate": 0}, "learning_rate = 0"),
        ({"torch_compile": True, "feature_weight": 1.0}, "feature_weight=1 looks inside the networks"),
        ({"torch_compile": True, "method": "ant"}, "method ant looks inside the networks"),
        ({"fsdp": True, "adapter": "lora"}, "adapter='lora'; set adapter to 'full', or leave fsdp out"),
        ({"fsdp": True, "optimizer": "prodigy"}, "optimizer='prodigy'; set optimizer to 'adamw'"),
        ({"fsdp": True, "torch_compile": True}, "torch_compile=True; set torch_compile to False"),
        ({"fsdp": True, "mixed_precision": "fp16"}, "set mixed_precision to bf16 or no"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, told):
    assert told in problems(instance_data_dir="x", **settings)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("output_dir = \n", "not valid TOML"),
        (b'output_dir = "caf\xe9"\n', "not valid TOML"),
        ("[train]\nrank = 1\n", "train:"),
    ],
)
def test_unreadable_files_are_told(content, told, write):
    path = write(content)
    assert told in problems(path)
    result = domainstudio("train", path)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


def test_missing_recipe_file(tmp_path):
    assert "cannot read recipe" in problems(tmp_path / "none.toml")
    assert "cannot read recipe" in problems(tmp_path)


@pytest.mark.parametrize(
    ("settings", "nearest", "numbers"),
    [
        ({}, None, (100, 100)),
        ({}, 100, (100, 300)),
        ({"pair_batch_size": 120}, None, (120, 120)),
        ({"pair_batch_size": 120}, 100, (120, 360)),
        ({"num_class_images": 50}, 20, (50, 50)),
        ({"num_class_images": 50}, None, (50, 50)),
    ],
)
def test_more_source_samples_are_drawn_where_the_nearest_are_chosen(settings, nearest, numbers):
    assert Recipe(instance_data_dir="x", **settings).class_images(nearest) == numbers


def test_settings_without_effect_are_warned_of():
    assert Recipe(instance_data_dir="x").warnings() == []
    (warning,) = Recipe(instance_data_dir="x", rank=4).warnings()
    assert "rank" in warning
    assert Recipe(instance_data_dir="x", rank=4, adapter="lora").warnings() == []
    warned = " ".join(Recipe(instance_data_dir="x", method="finetune", num_class_images=20).warnings())
    assert "num_class_images" in warned
    (warning,) = Recipe(instance_data_dir="x", use_ema=False, ema_decay=0.9).warnings()
    assert "ema_decay" in warning
    assert Recipe(instance_data_dir="x", ema_decay=0.9).warnings() == []


def test_a_recipe_cannot_be_changed():
    with pytest.raises((ValidationError, dataclasses.FrozenInstanceError)):
        Recipe(instance_data_dir="x").rank = 3


def test_a_run_says_what_was_chosen_for_it(tmp_path, pipelines, pictures):
    """In comments, which are settings without their first two characters."""
    given = {"instance_data_dir": pictures, "pretrained_model_name_or_path": pipelines("pixel_epsilon")}
    given |= {"output_dir": tmp_path / "run", **FAST, "max_train_steps": 1, "image_weight": 0.3}
    assert domainstudio("train", *flags(**given)).code == 0
    text = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    asked = build_recipe(tmp_path / "run" / "config.toml", {})
    assert (asked.image_weight, asked.hf_weight, asked.random_flip, asked.learning_rate) == (0.3, None, None, None)
    told = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")][1:]
    (tmp_path / "told.toml").write_text("\n".join([*told, 'instance_data_dir = "x"']), encoding="utf-8")
    chosen = build_recipe(tmp_path / "told.toml", {})
    assert (chosen.hf_weight, chosen.transfer_weight, chosen.learning_rate, chosen.resolution) == (0.05, 10, 1e-4, 16)
    assert chosen.random_flip is not None
    assert (chosen.image_weight, chosen.nearest_class_images) == (None, None), "one is given, the other all of 4"
    (flip,) = (line for line in told if line.startswith("random_flip"))
    assert re.search(r"Chosen: the pictures face (both ways|one way) \(asymmetry \d\.\d\d\)$", flip)
