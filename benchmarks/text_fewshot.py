"""Ten-shot benchmark of the bundled text-to-image source: `python benchmarks/text_fewshot.py` (resumable; `--table`).

Every run trains with fixed seeds and is measured at several steps with its averaged weights: held-out KID, Intra-LPIPS
and copies of pictures of the new style; how often such pictures show the attributes their prompts name (agreement, read
off by the network of sources/avatars/attributes.py); and how far pictures of prompts without the style moved from the
source's (drift). One JSON object a measurement is appended to docs/benchmarks/text_fewshot.jsonl; what is there already
is not measured again. Needs Node.js once, for the prompts of the agreement.
"""

import argparse
import sys
import time
from functools import cache
from pathlib import Path

from fewshot import NUMBERS, UNWATCHED, scratch_folder
from rows import Row, by_step, mean_of, name_of, parse_entry, read_rows, spread, write_row, write_tables
from standing import COPY_ALLOWANCE, DEFAULT, honest
from torch import Tensor

from domainstudio.app.draw import draw_from, negative_prompt
from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.captions import fill
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.evaluate import Evaluator
from domainstudio.evaluation.features import embed, load_lpips
from domainstudio.evaluation.metrics import drift
from domainstudio.evaluation.protocol import Protocol
from domainstudio.models.sample import TextGuidance, decode, sample
from domainstudio.training.train import StepEvent

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "sources/avatars"))
from attributes import agreement_of, asked  # noqa: E402
from captions import KIND, caption  # noqa: E402
from domains import STYLE  # noqa: E402

RESULTS = ROOT / "docs/benchmarks/text_fewshot.jsonl"
SOURCE = "bundled:avatars-text"
RARE_WORD, NEW_WORD = "pyramid", "<pyramid>"
"""`pyramid` is to this source what a rare token is elsewhere: known, and of another meaning (a robot's top). Our
default makes a new word of it, which begins with that meaning."""
CLASS_PROMPT = "a portrait of a person"
GUIDANCE = 2.0
SAMPLING_SEED, SAMPLING_STEPS = 77, 25
MEASURES = (*NUMBERS[:5], "agreement", "drift", "class_drift")
BASELINES = ("dreambooth adapter=full", "dreambooth")
COMMON = {"captions": "files", "train_batch_size": 10, "pair_batch_size": 10, "lora_layers": "all"}
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}
"""Of a source this small, for every method; ten times the usual ones of Stable Diffusion and more."""
AGREEMENT_ALLOWANCE = 0.05
DRIFT_SHARE = 0.5


class Prompts:
    """What a measurement asks for: the style, attributes in it (but for those that it decides), prompts without it."""

    def __init__(self, build: Path, num_images: int, domain: str):
        self.num_images = num_images
        named = asked(build, 3 * num_images // 4, num_images // 5)
        left = ({key: value for key, value in a.items() if key not in STYLE[domain]} for a in named if KIND not in a)
        self.attributes = [a for a in left if a]
        self.captions = [caption(a) for a in self.attributes]
        robots = [caption(a) for a in named if KIND in a]
        self.robots = [text for text in robots if RARE_WORD not in text]


@cache
def source_pictures(prompts: tuple[str, ...]) -> Tensor:
    return draw_from(
        open_source(SOURCE), len(prompts), SAMPLING_SEED, SAMPLING_STEPS, guidance=TextGuidance(prompts, GUIDANCE)
    )


@cache
def lpips_of(pictures: Tensor) -> Tensor:
    return embed(load_lpips("vgg"), pictures, px=64)


def measure(draw, evaluator: Evaluator, prompts: Prompts, template: str) -> Row:
    """`draw` gives pictures of prompts; `template` says a caption in the style."""
    result = evaluator.evaluate(draw([fill(template, CLASS_PROMPT)] * prompts.num_images)).to_json()
    shares = agreement_of(draw([fill(template, text) for text in prompts.captions]), prompts.attributes)
    result |= {"agreement": sum(shares.values()) / len(shares), "agreements": shares}
    for name, texts in (("drift", prompts.robots), ("class_drift", prompts.captions[: len(prompts.robots)])):
        before = lpips_of(source_pictures(tuple(texts)))
        result[name] = drift(embed(load_lpips("vgg"), draw(texts), px=64), before)
    return result


def row_of(result: Row) -> Row:
    return {name: result[name] for name in (*MEASURES, "agreements", "num_images", "num_reference")}


def measure_run(domain, evaluator, prompts, method, settings, seed, steps, at, args) -> None:
    key = {"domain": domain, "name": name_of(method, settings), "seed": seed}
    started = [time.perf_counter()]
    instance_prompt = f"{{caption}}, {NEW_WORD if method == DEFAULT else RARE_WORD}"
    is_recipe = method.endswith(".toml")

    def watch(event: StepEvent) -> None:
        if event.step not in at:
            return
        begin = time.perf_counter()
        with event.averaged() as network:

            def draw(texts: list[str]) -> Tensor:
                guidance = TextGuidance(texts, GUIDANCE, negative_prompt(recipe, texts))
                x0 = sample(source, network, len(texts), SAMPLING_SEED, SAMPLING_STEPS, guidance=guidance)
                return decode(source, x0)

            result = measure(draw, evaluator, prompts, instance_prompt)
        seconds = round(begin - started[0], 1)
        write_row(args.results, {**key, "step": event.step, "seconds": seconds}, row_of(result))
        started[0] += time.perf_counter() - begin

    adapter = settings.get("adapter", "lora")
    only = {} if adapter == "lora" else {"lora_layers": None}
    with scratch_folder() as folder:
        recipe = build_recipe(
            ROOT / method if is_recipe else None,
            {
                **({} if is_recipe else {"method": method}),
                **COMMON,
                **only,
                "learning_rate": LEARNING_RATES[adapter],
                "pretrained_model_name_or_path": SOURCE,
                "instance_data_dir": f"bundled:{domain}",
                "output_dir": f"{folder}/run",
                "instance_prompt": instance_prompt,
                "class_prompt": CLASS_PROMPT,
                "max_train_steps": steps,
                "seed": seed,
                "guidance_scale": GUIDANCE,
                **UNWATCHED,
                **settings,
            },
        )
        source = open_source(SOURCE)
        if recipe.identifier is not None:
            source.add_identifier(recipe.identifier)
        if recipe.train_text_encoder:
            source = source.with_text_encoder()
        train_run(recipe, observers=(watch,))


def tables(results: list[Row]) -> str:
    """Markdown: per domain, every method at every step, mean ± standard deviation over seeds."""
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in results):
        rows = [row for row in results if row["domain"] == domain]
        lines += [
            f"\n## {domain}\n",
            "| | step | seeds | KID x10³ | FID | Intra-LPIPS | copies | attributes | drift | class drift |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        numbers = (
            *(("kid", 1, 1), ("fid", 0, 1), ("intra_lpips", 3, 1), ("copy_rate", 1, 100), ("agreement", 1, 100)),
            *(("drift", 3, 1), ("class_drift", 3, 1)),
        )
        for name in sorted(dict.fromkeys(row["name"] for row in rows), key=lambda n: (n not in ("real", "source"), n)):
            for step, group in by_step(rows, name).items():
                cells = [
                    spread(group, key, digits, scale) if group[0][key] is not None else "–"
                    for key, digits, scale in numbers
                ]
                lines.append(f"| {name} | {step or '–'} | {len(group)} | {' | '.join(cells)} |")
        lines += ["", *verdicts(rows)]
    return "\n".join(lines) + "\n"


def best_honest(steps: dict[int, list[Row]], real_rate: float) -> tuple[int, list[Row]] | None:
    """The step with the lowest mean held-out KID among those that do not copy."""
    return min(honest(steps, real_rate), key=lambda item: mean_of(item[1], "kid"), default=None)


def judged(met: bool) -> str:
    return "(met)" if met else "(MISSED)"


def verdicts(rows: list[Row]) -> list[str]:
    """What the default keeps, at each step, against the best honest checkpoint of each DreamBooth; one domain."""
    [real], [source] = by_step(rows, "real")[0], by_step(rows, "source")[0]
    lines = []
    for baseline in BASELINES:
        best = best_honest(by_step(rows, baseline), real["copy_rate"])
        if best is None:
            continue
        theirs = {name: mean_of(best[1], name) for name in MEASURES}
        their_gaps = gaps(best[1], real)
        lines.append(f"Against `{baseline}` at its best honest step, {best[0]}:\n")
        for step, group in by_step(rows, DEFAULT).items():
            own = {name: mean_of(group, name) for name in MEASURES}
            own_gaps = gaps(group, real)
            checks = (
                ("KID", f"{own['kid']:.1f} to {theirs['kid']:.1f}", own["kid"] < theirs["kid"]),
                *(
                    (name, f"{gap:.3f} to {their_gaps[name]:.3f}", gap < their_gaps[name])
                    for name, gap in own_gaps.items()
                ),
                (
                    "copies",
                    f"{100 * own['copy_rate']:.1f} % to {100 * theirs['copy_rate']:.1f} %",
                    own["copy_rate"] <= theirs["copy_rate"] + COPY_ALLOWANCE,
                ),
                (
                    "attributes",
                    f"{100 * own['agreement']:.1f} % to the source's {100 * source['agreement']:.1f} %",
                    own["agreement"] >= source["agreement"] - AGREEMENT_ALLOWANCE,
                ),
                (
                    "drift",
                    f"{own['drift']:.3f}, {own['drift'] / theirs['drift']:.2f} of its",
                    own["drift"] <= DRIFT_SHARE * theirs["drift"],
                ),
            )
            told = "; ".join(f"{name} {values} {judged(met)}" for name, values, met in checks)
            lines.append(f"* `{DEFAULT}`, step {step}: {told}")
        lines.append("")
    return lines


def gaps(rows: list[Row], real: Row) -> dict[str, float]:
    """How far Intra-LPIPS is from that of real pictures: a run's, on average, and the average run's."""
    each = [row["intra_lpips"] - real["intra_lpips"] for row in rows]
    return {"gap": sum(map(abs, each)) / len(each), "gap of the mean": abs(sum(each)) / len(each)}


DOMAINGALLERY = (
    'recipes/domaingallery.toml erase_steps=50 gradient_checkpointing=false mixed_precision="no" @ 150,250,350'
)
METHODS = (
    *("studio @ 300", "dreambooth @ 50,100", 'dreambooth adapter="full" @ 100'),
    *("finetune @ 50,100", "domainstudio @ 50,100,200", DOMAINGALLERY),
)
PLAN = dict.fromkeys(("watercolour", "sunglasses"), METHODS)
"""What is measured where, as in fewshot.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=list(PLAN))
    parser.add_argument("--methods", nargs="+", help='instead of the plan: "studio adapter=\\"lora\\" @ 100,200"')
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--build", type=Path, default=ROOT / "build/avatars")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the tables of what was measured beside --results")
    args = parser.parse_args()
    if args.table:
        write_tables(args.results, "Ten-shot adaptation of a text-to-image source", tables(read_rows(args.results)))
        return
    args.build.mkdir(parents=True, exist_ok=True)
    done = {(row["domain"], row["name"], row["seed"], row["step"]) for row in read_rows(args.results)}
    for domain in args.domains:
        prompts = Prompts(args.build, args.num_images, domain)
        training, heldout = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
        evaluator = Evaluator(training, heldout, Protocol())
        empty: Row = dict.fromkeys(("agreement", "agreements", "drift", "class_drift"))
        if (domain, "real", 0, 0) not in done:
            write_row(
                args.results,
                {"domain": domain, "name": "real", "seed": 0, "step": 0},
                row_of(evaluator.real().to_json() | empty),
            )
        if (domain, "source", 0, 0) not in done:
            result = measure(lambda texts: source_pictures(tuple(texts)), evaluator, prompts, "{caption}")
            key = {"domain": domain, "name": "source", "seed": 0, "step": 0}
            write_row(args.results, key, row_of(result))
        for seed in args.seeds:
            for text in args.methods or PLAN[domain]:
                method, settings, steps = parse_entry(text)
                left = [step for step in steps if (domain, name_of(method, settings), seed, step) not in done]
                if left:
                    measure_run(domain, evaluator, prompts, method, settings, seed, max(steps), left, args)


if __name__ == "__main__":
    main()
