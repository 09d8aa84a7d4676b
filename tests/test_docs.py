"""What the documentation tells people to type and to open, works."""

import re
import shlex
from pathlib import Path

import pytest

from domainstudio.app.cli import _parser
from domainstudio.app.recipe import build_recipe

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
RECIPES = sorted(ROOT.glob("recipes/*.toml"))
COMMAND = re.compile(r"(?:^|[\s`/(])domainstudio ((?:demo|check|train|doctor|sample|export|evaluate|compare)\b[^`\n]*)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def commands() -> list[tuple[str, str]]:
    """(file, arguments) of every command shown."""
    return [
        (path.relative_to(ROOT).as_posix(), found.split(" #")[0].strip())
        for path in [*PAGES, *RECIPES, *ROOT.glob("examples/*"), ROOT / "Makefile"]
        for found in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " "))
    ]


def test_there_is_something_to_check():
    shown = {arguments.split()[0] for file, arguments in commands() if file == "README.md"}
    assert shown >= {"check", "train", "doctor", "sample", "evaluate", "compare"}
    assert RECIPES


@pytest.mark.parametrize(("file", "arguments"), commands())
def test_commands_parse(file, arguments):
    argv = shlex.split(arguments)
    if argv[-1] == "--help":
        argv.pop()
        assert argv == ["train"]
    else:
        _parser().parse_args(argv)
    for name in argv:
        if name.endswith(".toml") and name.startswith("recipes/"):
            assert (ROOT / name).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_build(path):
    recipe = build_recipe(path, {})
    assert recipe.warnings() == []
    assert recipe.output_dir.startswith("runs/")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_exist(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = link.partition("#")[0]
        if target and "://" not in target:
            assert (page.parent / target).exists(), link


def test_flags_of_the_guides_exist(capsys):
    known = set()
    for command in ("demo", "check", "train", "doctor", "sample", "export", "evaluate", "compare"):
        with pytest.raises(SystemExit):
            _parser().parse_args([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page in ("README.md", "docs/guide.md", "docs/stable-diffusion.md"):
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (ROOT / page).read_text(encoding="utf-8")))
        assert mentioned <= known, page
