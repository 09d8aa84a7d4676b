"""evaluate, compare and demo, through the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import FAST, domainstudio, metrics, succeeds, tree
from PIL import Image

from domainstudio.app import recipe as recipes
from domainstudio.app.compare import METHOD_TITLES
from domainstudio.app.demo import TEXT
from domainstudio.data.bundled import bundled_domain
from domainstudio.errors import MissingWeights
from domainstudio.evaluation import features
from domainstudio.evaluation.weights import find_weights
from domainstudio.training.methods import METHODS

NUMBERS = ("intra_lpips", "kid", "fid", "copy_rate", "nearest_lpips")
COVERAGE = ("precision", "recall", "density", "coverage", "vendi")
ON_REQUEST = ("cmmd", "fd_dino", "clip_image", "clip_text")
PROTOCOLS = tuple(f"{name}_protocol" for name in ("intra_lpips", "copy", "kid", "fid", "coverage", "vendi"))


@pytest.fixture
def no_weights(monkeypatch):
    def missing(name: str) -> Path:
        raise MissingWeights(f"the {name} weights are not here")

    monkeypatch.setattr(features, "find_weights", missing)


def evaluated(*argv: object) -> dict:
    """What `evaluate --json` prints: one object, strict JSON, and nothing else."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    result = succeeds("evaluate", *argv, "--json")
    assert result.out.endswith("}\n")
    assert result.out.count("\n") == 1
    return json.loads(result.out, parse_constant=refuse)


@pytest.mark.usefixtures("stubs")
class TestEvaluate:
    def test_a_run(self, full_run, pictures, heldout):
        given = (full_run, "--instance-data-dir", pictures, "--reference-dir", heldout, "--num-images", 12)
        measured = evaluated(*given)
        assert all(isinstance(measured[name], float) for name in (*NUMBERS, *COVERAGE))
        assert all(isinstance(measured[name], str) for name in PROTOCOLS)
        assert (measured["num_images"], measured["num_reference"]) == (12, 12)
        assert set(measured["reasons"]) == {*ON_REQUEST, "unadapted_rate"}
        assert "too much like the training pictures" in measured["reasons"]["unadapted_rate"]  # both are noise
        assert len(measured["nearest_indices"]) == 12
        assert measured == evaluated(*given)
        assert measured != evaluated(*given, "--seed", 1)
        assert evaluated(*given, "--intra", "crdi")["intra_lpips_protocol"].startswith("CRDI")

    def test_without_reference_kid_is_null_with_the_reason(self, full_run, pictures):
        measured = evaluated(full_run, "--instance-data-dir", pictures, "--num-images", 12)
        assert measured["kid"] is measured["fid"] is None
        for name in ("kid", "fid"):
            assert "--reference-dir" in measured["reasons"][name]
        assert measured["num_reference"] == 0

    def test_a_folder_is_measured_whole_and_copies_are_found(self, pictures, heldout):
        measured = evaluated(pictures, "--instance-data-dir", pictures, "--reference-dir", heldout, "--num-images", 3)
        assert (measured["num_images"], measured["copy_rate"]) == (10, 1.0)
        assert measured["nearest_indices"] == list(range(10))

    def test_what_looks_like_the_source_is_told_from_it(self, pictures, tmp_path):
        """Black pictures are the source's; a quarter of what is measured is, too."""
        source, mixed = tmp_path / "source", tmp_path / "mixed"
        for folder, num in ((source, 4), (mixed, 2)):
            folder.mkdir()
            for index in range(num):
                Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"black{index}.png")
        for file in sorted(pictures.glob("*.png"))[:6]:
            shutil.copy(file, mixed)
        given = (mixed, "--instance-data-dir", pictures)
        measured = evaluated(*given, "--source-dir", source)
        assert measured["unadapted_rate"] == 0.25
        assert "4 of the source's pictures" in measured["unadapted_protocol"]
        assert "--source-dir" in evaluated(*given)["reasons"]["unadapted_rate"]

    def test_a_zip(self, pictures, heldout, tmp_path):
        file = shutil.make_archive(str(tmp_path / "zip"), "zip", heldout)
        given = ("--instance-data-dir", pictures, "--reference-dir")
        assert evaluated(file, *given, heldout) == evaluated(heldout, *given, file)

    def test_a_pipeline_folder(self, full_run, pictures):
        measured = evaluated(full_run / "pipeline", "--instance-data-dir", pictures, "--num-images", 3)
        assert measured["num_images"] == 3

    def test_the_table_says_the_same(self, full_run, pictures, heldout):
        given = (full_run, "--instance-data-dir", pictures, "--reference-dir", heldout, "--num-images", 12)
        measured, lines = evaluated(*given), succeeds("evaluate", *given).out.splitlines()
        shown = {line.split()[0]: line.split()[1] for line in lines[:-1]}
        numbers = {name: f"{measured[name]:.4f}" for name in (*NUMBERS, *COVERAGE)}
        for name in ("kid", "intra_lpips"):
            numbers[name] += f"±{measured[f'{name}_error']:.4f}"
        assert shown == {**numbers, "unadapted_rate": "–", "num_images": "12"}
        assert lines[-1].startswith("with --clip and --dino also: ")
        assert set(lines[-1].split(": ")[1].split(", ")) == set(ON_REQUEST)


@pytest.mark.usefixtures("no_weights")
def test_without_weights_everything_runs_and_says_what_is_missing(full_run, pictures, tmp_path):
    given = (full_run, "--instance-data-dir", pictures, "--reference-dir", pictures, "--num-images", 3)
    measured = evaluated(*given)
    for name in NUMBERS:
        assert measured[name] is None
        assert "weights are not here" in measured["reasons"][name]
    assert measured["num_images"] == 3
    assert succeeds("evaluate", *given).out.count("weights are not here") == len((*NUMBERS, "vendi", "unadapted_rate"))
    report = tmp_path / "report.html"
    result = succeeds("compare", full_run, "--num-images", 3, "--output", report)
    assert "weights are not here" in result.out
    assert "weights are not here" in report.read_text()


def test_one_real_evaluation(pictures, heldout):
    """With the published networks, where they are installed."""
    try:
        find_weights("lpips-alex"), find_weights("inception")
    except MissingWeights:
        pytest.skip("the metric networks are not installed")
    given = ("--instance-data-dir", pictures, "--reference-dir", heldout, "--lpips", "alex")
    measured = evaluated(pictures, *given)
    assert measured["nearest_lpips"] == pytest.approx(0, abs=1e-4)
    assert measured["copy_rate"] == 1
    assert measured["fid"] > 0
    assert measured["intra_lpips_protocol"].startswith("CDC: LPIPS-ALEX at 32 px, 10 images")
    assert "no two images share" in measured["reasons"]["intra_lpips"]


def assert_self_contained(page: str) -> None:
    assert not re.search(r"<(script|link|iframe|object|embed)\b", page)
    assert not re.search(r"@import|url\((?!['\"]?data:)", page)
    sources = re.findall(r"""\b(?:src|href|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)


@pytest.mark.usefixtures("stubs")
class TestCompare:
    def test_report_and_table(self, full_run, plain_run, heldout, tmp_path):
        before, report = tree(full_run), tmp_path / "new" / "report.html"
        given = ("--reference-dir", heldout, "--num-images", 12, "--output", report)
        result = succeeds("compare", full_run, plain_run, *given)
        page = report.read_text(encoding="utf-8")
        assert [path.name for path in report.parent.iterdir()] == ["report.html"]
        assert_self_contained(page)
        titles = ("Un-adapted source", "DomainStudio", "Plain fine-tuning", "Copier", "Real held-out pictures")
        for title in titles:
            assert title in page
            assert all(word in result.out for word in title.split())
        assert result.out.splitlines()[-1] == f"report: {report}"
        assert tree(full_run) == before

    def test_two_runs_of_a_method_are_told_apart(self, full_run, tmp_path):
        other = shutil.copytree(full_run, tmp_path / "other")
        succeeds("compare", full_run, other, "--num-images", 3, "--output", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert "DomainStudio (full)" in page
        assert "DomainStudio (other)" in page

    def test_without_reference(self, lora_run, tmp_path):
        succeeds("compare", lora_run, "--num-images", 3, "--output", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert_self_contained(page)
        assert "Copier" in page
        assert "--reference-dir" in page

    def test_a_run_beside_pictures_made_by_anything(self, plain_run, heldout, tmp_path):
        theirs = shutil.copytree(heldout, tmp_path / "theirs")
        result = succeeds("compare", plain_run, theirs, "--num-images", 5, "--output", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        titles = ("Un-adapted source", "Plain fine-tuning", "theirs", "Copier")
        assert [line.split("  ")[0].strip() for line in result.out.splitlines() if line.strip().startswith(titles)]
        rows = re.findall(r'<th scope="row">([^<]*)<small>([^<]*)</small>', page)
        number = len(list(heldout.iterdir()))
        assert ("theirs", f"{number} pictures, however they were made") in rows
        assert [title for title, _ in rows[:4]] == list(titles)
        noise = page[page.index("Same noise, side by side") : page.index("Samples and their nearest")]
        assert "Plain fine-tuning, noise 1" in noise
        assert "theirs" not in noise

    def test_pictures_alone(self, pictures, heldout, tmp_path):
        given = ("--instance-data-dir", pictures, "--reference-dir", heldout, "--output", tmp_path / "report.html")
        zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", heldout)
        other = shutil.copytree(heldout, tmp_path / "other" / heldout.name)
        succeeds("compare", heldout, other, zipped, *given)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert_self_contained(page)
        for title in (str(heldout), str(other), "zipped.zip", "Copier", "Real held-out pictures"):
            assert f'<th scope="row">{title}<small>' in page
        assert "Un-adapted source" not in page
        assert "Same noise" not in page
        measured = evaluated(heldout, "--instance-data-dir", pictures, "--reference-dir", heldout)
        assert f">{measured['intra_lpips']:.3f}" in page

    def test_every_method_has_a_title(self):
        assert METHOD_TITLES.keys() == set(METHODS)


@pytest.fixture
def tiny_bundle(monkeypatch, pipelines):
    """The tiny pipeline in place of the bundled model, and settings that take a moment."""
    monkeypatch.setattr("domainstudio.app.materials.bundled_model", lambda name: pipelines("pixel_epsilon"))
    build = recipes.build_recipe

    def fast(path, settings):
        quick = {name: value for name, value in FAST.items() if name not in ("max_train_steps", "validation_steps")}
        return build(path, {**settings, **quick})

    monkeypatch.setattr("domainstudio.app.demo.build_recipe", fast)


@pytest.mark.usefixtures("stubs", "tiny_bundle")
def test_demo(tmp_path):
    given = ("demo", "--output-dir", tmp_path / "demo", "--max-train-steps", 4, "--num-images", 6)
    result = succeeds(*given)
    report = tmp_path / "demo" / "report.html"
    assert result.out.splitlines()[-1] == f"report: {report}"
    page = report.read_text(encoding="utf-8")
    assert_self_contained(page)
    for title in ("Un-adapted source", "Plain fine-tuning", "DomainStudio", "Copier", "Real held-out pictures"):
        assert title in page
    runs = [tmp_path / "demo" / name for name in ("finetune", "studio")]
    assert all(len(metrics(run)) == 4 for run in runs)

    before = [tree(run) for run in runs]
    assert "training studio" not in succeeds(*given).err  # finished runs are kept
    assert [tree(run) for run in runs] == before
    shutil.rmtree(runs[1] / "pipeline")  # as if it had been stopped
    succeeds(*given)
    assert (runs[1] / "pipeline" / "model_index.json").exists()

    other = domainstudio(*given[:-3], 5, *given[-2:])
    assert (other.code, other.out) == (2, "")
    assert "other settings" in other.err


@pytest.mark.usefixtures("stubs")
def test_demo_of_the_text_to_image_source(tmp_path, monkeypatch):
    build, quick = recipes.build_recipe, {"num_class_images": 6, "pair_batch_size": 3, "num_inference_steps": 3}
    monkeypatch.setattr("domainstudio.app.demo.build_recipe", lambda path, settings: build(path, settings | quick))
    out = tmp_path / "demo"
    result = succeeds("demo", "--text", "--output-dir", out, "--max-train-steps", 2, "--num-images", 4)
    assert "00.png  a portrait of a man with dark skin" in result.err
    assert "in place of their captions: a portrait of a person, <pyramid>" in result.err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    for title in ("DreamBooth", "DomainStudio", *TEXT.captions):
        assert title in page
    for name in ("dreambooth", "studio"):
        assert [record["step"] for record in metrics(out / name) if "loss" in record] == [1, 2]
        assert (out / name / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_what_the_demo_asks_for_is_in_none_of_its_pictures():
    shown = (bundled_domain("watercolour") / "metadata.jsonl").read_text(encoding="utf-8")
    for rare in ("big curly red", "round glasses", "turban", "flowers", "moustache"):
        assert rare not in shown
        assert any(rare in caption for caption in TEXT.captions)
