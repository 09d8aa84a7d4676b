import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import domainstudio

ROOT = Path(domainstudio.__file__).parent
ORDER = "__init__ errors precision quiet|diffusion losses|models data|training|evaluation|app|__main__"
RANK = {room: rank for rank, rooms in enumerate(ORDER.split("|")) for room in rooms.split()}
THIRD_PARTIES = {  # where each may be imported; any other, torchmetrics for one, nowhere
    "torch": ("precision.py", "diffusion/", "losses/", "models/", "data/", "training/", "evaluation/", "app/"),
    "numpy": ("models/", "data/", "training/", "evaluation/", "app/"),
    "safetensors": ("models/", "training/", "evaluation/cache.py", "app/"),
    "diffusers": ("models/", "quiet.py"),
    "transformers": ("models/", "quiet.py", "evaluation/foundation.py"),
    "peft": ("models/",),
    "PIL": ("data/", "evaluation/", "app/"),
    "accelerate": ("training/", "app/"),
    **dict.fromkeys(("bitsandbytes", "prodigyopt"), ("training/optimisation.py",)),
    **{"pydantic": ("app/recipe.py",), "rich": ("app/",)},
}
PROBE = """
import sys
def refuse(event, args):
    assert not event.startswith(("socket.", "os.mkdir", "os.remove", "os.rename", "subprocess.")), event
    assert event != "open" or not set(args[1] or "") & set("wax+"), args
before = set(sys.modules)
sys.addaudithook(refuse)
import domainstudio
assert "torch" not in sys.modules
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new - set(sys.stdlib_module_names) == {"domainstudio"}, new
"""


def imports(path, package):
    """(line, dotted name) of everything a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_file_imports_only_what_its_room_may():
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT)
        room = file.parts[0].removesuffix(".py")
        assert room in RANK, f"{file}: a new room needs a place in ORDER"
        for line, name in imports(path, ".".join(("domainstudio", *file.parts[:-1]))):
            top, inner, *_ = *name.split("."), ""
            other = inner if inner in RANK else "__init__"
            fine = top in sys.stdlib_module_names or file.as_posix().startswith(THIRD_PARTIES.get(top, ()))
            if top == "domainstudio":
                fine = other == room or (RANK[other] < RANK[room] and (room != "evaluation" or RANK[other] == 0))
            assert fine, f"{file}:{line} may not import {name}"


def test_importing_the_package_loads_no_torch_and_touches_nothing():
    subprocess.run([sys.executable, "-B", "-c", PROBE], check=True)
