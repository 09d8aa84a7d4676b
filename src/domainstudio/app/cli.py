"""The command line. Flags are the recipe's settings; results go to stdout, everything else to stderr."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from domainstudio import __version__
from domainstudio.app.flags import add_measuring_flags, add_recipe_flags, option, positive
from domainstudio.errors import UserError, message_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it succeeded, 1 if a check found errors, 2 with one message for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    who = f"process {_rank()}: " if _rank() else ""
    try:
        args = _parser(with_recipe=argv[:1] in (["train"], ["doctor"])).parse_args(argv)
        if who and args.command != "train":
            print(f"{who}nothing to do: {args.command} runs in the first process alone", file=sys.stderr)
            return 0
        return args.run(args) or 0
    except (UserError, OSError) as error:
        print(f"{who}error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; continue a training run with --resume-from-checkpoint latest", file=sys.stderr)
        return 130


def _rank() -> int:
    """This process's number among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK", 0))


class _Parser(argparse.ArgumentParser):
    """No abbreviations (--lr would be --lr-warmup-steps), and mistakes told as all others are."""

    def __init__(self, **settings: Any):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser(with_recipe: bool = True) -> argparse.ArgumentParser:
    """All commands; the recipe's flags, which take seconds to import, only where they are asked for."""
    parser = _Parser(prog="domainstudio", description="A new image domain from about ten pictures.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="plain fine-tuning against DomainStudio on a bundled domain, with a report")
    demo.add_argument("--text", action="store_true", help="of a text-to-image model: DreamBooth against DomainStudio")
    demo.add_argument("--domain", default=None, help="training pictures (default: bundled:ink; bundled:watercolour)")
    option(demo, "--output-dir", type=Path, default=None, help="folder of runs and report (default: demo; demo-text)")
    option(demo, "--max-train-steps", type=positive, default=None, help="(default: what the default domain needs)")
    option(
        demo, "--num-images", type=positive, default=64, help="samples measured of each model (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="say what is wrong with a folder of training pictures; changes nothing")
    check.add_argument("folder", help="folder, or bundled:NAME")
    check.add_argument("--resolution", type=positive, default=None, help="side of the model's pictures")
    check.set_defaults(run=_check)

    train = commands.add_parser("train", help="adapt a source model to a folder of pictures")
    train.add_argument("recipe", nargs="?", type=Path, help="TOML file; flags override it")
    if with_recipe:
        add_recipe_flags(train)
    option(train, "--resume-from-checkpoint", metavar="latest|FOLDER", help="continue this run")
    train.set_defaults(run=_train)

    doctor = commands.add_parser("doctor", help="measure what a recipe takes on this machine; writes nothing")
    doctor.add_argument("recipe", nargs="?", type=Path, help="TOML file; flags override it")
    if with_recipe:
        add_recipe_flags(doctor)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    sample = commands.add_parser("sample", help="draw pictures from a finished run")
    sample.add_argument("target", type=Path, metavar="RUN")
    option(sample, "--num-images", type=positive, default=16)
    option(sample, "--seed", type=int, default=0)
    option(sample, "--output-dir", type=Path, required=True)
    text = sample.add_argument_group("text-to-image models")
    text.add_argument("--prompt", help="what to draw; {a|b} draws one of a and b (default: the run's own)")
    option(text, "--negative-prompt", help="what to be led away from")
    option(text, "--guidance-scale", type=float, default=None, help="classifier-free guidance (default: the run's)")
    strength = "pushes further away from what the source draws of --source-prompt (default: %(default)s)"
    option(text, "--style-strength", type=float, default=0.0, help=strength)
    option(text, "--source-prompt", help="--prompt without its style (default: the run's class prompt)")
    sample.set_defaults(run=_sample)

    export = commands.add_parser("export", help="write a run's result in a format that other tools read")
    export.add_argument("target", type=Path, metavar="RUN")
    kinds = "LoRA for diffusers; LoRA for ComfyUI and A1111; or a whole pipeline folder"
    export.add_argument("--format", choices=["diffusers", "kohya", "merged"], default="diffusers", help=kinds)
    export.add_argument("--output", type=Path, required=True, help="FILE.safetensors, or a new folder (merged)")
    export.add_argument("--metadata", action=argparse.BooleanOptionalAction, default=True, help="in a kohya file")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="measure a run, or a folder of pictures made by anything")
    evaluate.add_argument("target", type=Path, metavar="RUN|FOLDER")
    option(evaluate, "--instance-data-dir", required=True, help="the training pictures: folder or bundled:NAME")
    add_measuring_flags(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="put runs and folders of pictures side by side in one HTML report")
    compare.add_argument("targets", nargs="+", type=Path, metavar="RUN|FOLDER")
    theirs = "the training pictures, where no run is given: folder or bundled:NAME"
    option(compare, "--instance-data-dir", help=theirs)
    compare.add_argument("--output", type=Path, default=Path("report.html"))
    besides = "what text-to-image models are asked for besides, the runs in their own style; may be given again"
    compare.add_argument("--caption", action="append", default=[], help=besides)
    add_measuring_flags(compare)
    compare.set_defaults(run=_compare)
    return parser


def _protocol(args: argparse.Namespace):
    from domainstudio.evaluation.foundation import CLIP, DINO
    from domainstudio.evaluation.protocol import Protocol

    return Protocol(
        lpips=args.lpips,
        lpips_px=args.lpips_px,
        intra=args.intra,
        clip=CLIP if args.clip == "" else args.clip,
        dino=DINO if args.dino == "" else args.dino,
        seed=args.seed,
    )


def _demo(args: argparse.Namespace) -> None:
    from domainstudio.app.console import Console, print_table
    from domainstudio.app.demo import PICTURES, TEXT, run_demo

    with Console() as console:
        result = run_demo(
            TEXT if args.text else PICTURES,
            args.output_dir,
            args.domain,
            args.max_train_steps,
            args.num_images,
            lambda recipe: (console.observe(recipe),),
            console.progress,
            console.log,
        )
    print_table(result.entries)
    print(f"report: {result.report.resolve()}")


def _check(args: argparse.Namespace) -> int:
    from domainstudio.data.bundled import bundled_domain, strip_prefix
    from domainstudio.data.check import check_folder

    name = strip_prefix(args.folder)
    result = check_folder(Path(args.folder) if name is None else bundled_domain(name), args.resolution)
    print(result.render())
    return 0 if result.ok else 1


def _train(args: argparse.Namespace) -> None:
    from domainstudio.app.console import Console
    from domainstudio.app.runs import train_run
    from domainstudio.training.processes import leave

    recipe = _recipe(args)
    with Console() as console:
        if not _rank():
            console.warn(recipe)
        drawing = console.part("drawing source samples")
        folder = train_run(recipe, args.resume_from_checkpoint, (console.observe(recipe),), drawing, console.log)
    leave()
    if _rank():
        return
    print(f"result: {folder.finished().resolve()}")
    if (best := folder.best.chosen_step()) is not None:
        print(f"best:   {folder.best.path.resolve()} (step {best})")
    print(f"report: domainstudio compare {folder.path} --output {folder.report}")


def _doctor(args: argparse.Namespace) -> None:
    from domainstudio.app.console import Console
    from domainstudio.app.doctor import diagnose

    recipe = _recipe(args)
    with Console() as console:
        console.warn(recipe)
        result = diagnose(recipe, console.part("measuring"))
    print(json.dumps(result.to_json()) if args.json else result.render())


def _recipe(args: argparse.Namespace):
    from domainstudio.app.recipe import Recipe, build_recipe

    return build_recipe(
        args.recipe, {name: getattr(args, name) for name in Recipe.model_fields if getattr(args, name) is not None}
    )


def _sample(args: argparse.Namespace) -> None:
    from domainstudio.app.console import Console
    from domainstudio.app.draw import Ask, sample_run

    ask = Ask(args.prompt, args.negative_prompt, args.guidance_scale, args.style_strength, args.source_prompt)
    with Console() as console:
        drawing = console.part("sampling")
        folder = sample_run(args.target, args.num_images, args.seed, args.output_dir, drawing, ask)
    print(folder.resolve())


def _export(args: argparse.Namespace) -> None:
    from domainstudio.app.export import export_run

    print(export_run(args.target, args.format, args.output, args.metadata).resolve())


def _evaluate(args: argparse.Namespace) -> None:
    from domainstudio.app.console import Console, print_evaluation
    from domainstudio.app.measure import evaluate_pictures

    with Console() as console:
        result = evaluate_pictures(
            args.target,
            args.instance_data_dir,
            args.reference_dir,
            args.num_images,
            args.seed,
            _protocol(args),
            console.progress,
            args.source_dir,
        ).to_json()
    if args.json:
        print(json.dumps(result))
    else:
        print_evaluation(result)


def _compare(args: argparse.Namespace) -> None:
    from domainstudio.app.compare import compare
    from domainstudio.app.console import Console, print_table

    with Console() as console:
        result = compare(
            args.targets,
            args.output,
            args.instance_data_dir,
            args.reference_dir,
            args.num_images,
            args.seed,
            _protocol(args),
            console.progress,
            args.caption,
            args.source_dir,
        )
    print_table(result.entries)
    print(f"report: {result.report.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
