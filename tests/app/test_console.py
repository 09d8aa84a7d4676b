import torch

from domainstudio.app.console import Console, print_evaluation, print_table
from domainstudio.app.recipe import Recipe
from domainstudio.evaluation.entry import ReportEntry
from domainstudio.training.train import StepEvent

MEASURED = {"kid": 12.345, "fid": 98.7, "intra_lpips": 0.4567, "nearest_lpips": 0.3}
MEASURED |= {"copy_rate": 0.125, "unadapted_rate": 0.25}


def entry(title: str, **metrics) -> ReportEntry:
    return ReportEntry(title, "", torch.zeros(8, 3, 32, 32), {"num_images": 8, **metrics})


def test_progress_and_messages_go_to_stderr(capsys):
    with Console() as console:
        console.log("[bold] /a/rather/long/path " + "x" * 100)
        console.part("sampling")(3, 8)
        observe = console.observe(Recipe(instance_data_dir="x", max_train_steps=7))
        observe(StepEvent(0, {}, lambda: None, lambda: None))
        observe(StepEvent(5, {"loss": 1.25, "simple": 1.0, "grad_norm": 3.0}, lambda: None, lambda: None))
    out, err = capsys.readouterr()
    assert out == ""
    assert "[bold] /a/rather/long/path " + "x" * 100 + "\n" in err  # neither markup nor wrapped
    assert "3/8" in err
    assert "5/7" in err


def test_table_of_a_comparison(capsys):
    missing = dict.fromkeys(MEASURED) | {"reasons": dict.fromkeys(MEASURED, "no [weights] here")}
    errors = {"kid_error": 1.25, "intra_lpips_error": 0.0123}
    print_table([entry("Ours", **MEASURED, **errors), entry("Other", **missing)])
    out, err = capsys.readouterr()
    assert err == ""
    ours, other = (next(line for line in out.splitlines() if name in line) for name in ("Ours", "Other"))
    told = ["12.3±1.2", "98.7", "0.457±0.012", "0.300", "12.5", "%", "25.0", "%", "8"]
    assert ours.split() == ["Ours", *told]
    assert other.split() == ["Other", *"––––––", "8"]
    assert out.count("– no [weights] here\n") == 1


def test_lines_of_an_evaluation(capsys):
    result = {**MEASURED, "kid": None, "reasons": {"kid": "no reference"}, "num_images": 8, "copy_protocol": "nearest"}
    result |= {
        "precision": 0.5,
        "recall": 0.25,
        "density": 0.75,
        "coverage": 1.0,
        "vendi": 3.5,
        "cmmd": 0.1,
        "fd_dino": 0.2,
        "clip_image": 0.3,
        "clip_text": 0.4,
        "coverage_protocol": "k",
    }
    print_evaluation(result)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["kid", "–", "no reference"],
        ["fid", "98.7000"],
        ["intra_lpips", "0.4567"],
        ["copy_rate", "0.1250", "nearest"],
        ["nearest_lpips", "0.3000", "nearest"],
        ["unadapted_rate", "0.2500"],
        ["precision", "0.5000", "k"],
        ["recall", "0.2500", "k"],
        ["density", "0.7500", "k"],
        ["coverage", "1.0000", "k"],
        ["vendi", "3.5000"],
        ["cmmd", "0.1000"],
        ["fd_dino", "0.2000"],
        ["clip_image", "0.3000"],
        ["clip_text", "0.4000"],
        ["num_images", "8"],
    ]
