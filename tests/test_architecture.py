import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import domainstudio

ROOT = Path(domainstudio.__file__).parent
RANK = {
    "": 0,
    "errors": 0,
    "diffusion": 1,
    "losses": 1,
    "models": 2,
    "data": 2,
    "training": 3,
    "evaluation": 4,
    "app": 5,
}
ALL_BUT_MATHS = ("models/", "data/", "training/", "evaluation/", "app/")
THIRD_PARTIES = {  # every other package, torchmetrics for one, is imported nowhere
    "torch": ("diffusion/", "losses/", *ALL_BUT_MATHS),
    "numpy": ALL_BUT_MATHS,
    "safetensors": ("models/", "training/", "app/"),
    "diffusers": ("models/",),
    "transformers": ("models/",),
    "peft": ("models/",),
    "PIL": ("data/", "evaluation/", "app/"),
    "accelerate": ("training/", "app/"),
    "pydantic": ("app/recipe.py",),
    "rich": ("app/",),
}
PROBE = """
import sys
def refuse(event, args):
    writes = event == "open" and (set(args[1] or "") & set("wax+"))
    assert not writes and not event.startswith(("socket.", "os.mkdir", "os.remove", "os.rename", "subprocess.")), event
before = set(sys.modules)
sys.addaudithook(refuse)
import domainstudio
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "torch" not in sys.modules
assert new - set(sys.stdlib_module_names) == {"domainstudio"}, new
"""


def imports(path, package):
    """Dotted names that a file imports, at any depth: (line, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_file_imports_only_what_its_room_may():
    files = {path: path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))}
    rooms = {path: file.parts[0].removesuffix(".py").replace("__init__", "") for path, file in files.items()}
    assert set(rooms.values()) <= set(RANK), "a new room needs a place in RANK"
    broken = []
    for path, file in files.items():
        for line, name in imports(path, ".".join(("domainstudio", *file.parts[:-1]))):
            top, inner, *_ = *name.split("."), ""
            if top == "domainstudio":
                room, other = rooms[path], inner if inner in RANK else ""
                fine = other == room or (RANK[other] < RANK[room] and (room != "evaluation" or RANK[other] == 0))
            else:
                fine = top in sys.stdlib_module_names or file.as_posix().startswith(THIRD_PARTIES.get(top, ()))
            if not fine:
                broken.append(f"{file}:{line} imports {name}")
    assert not broken, "\n".join(broken)


def test_importing_the_package_loads_no_torch_and_touches_nothing():
    subprocess.run([sys.executable, "-B", "-c", PROBE], check=True)
