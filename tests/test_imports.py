"""The house: rooms stand in one order, are entered by their front doors, open fast, and their menus are true."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ecanet
from source_files import tree

PACKAGE = Path(ecanet.__file__).parent

# Top to bottom. A room imports only what stands below it. "" is ecanet/__init__.py, the front door of the house.
ROOMS = """
    __main__ cli studies training shards report data "" deploy inference networks surgery models attention ops
    recipes testing progress errors
""".replace('""', "(house)").split()
ROOMS = ["" if room == "(house)" else room for room in ROOMS]

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    for path in PACKAGE.rglob("*.py")
)
CORRIDORS = {"studies"}
"""Rooms whose doors are the rooms inside them: each is imported when it is used."""


def path_of(module: str) -> Path:
    inside = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")


def room_of(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def imports_of(source: str) -> set[tuple[str, str]]:
    """(module, name) of everything of ecanet that ``source`` imports, anywhere in it, without ``ecanet.``."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say the whole name"
            for alias in node.names:
                # `from ecanet import data` means a room where there is one, and a name in the front door otherwise
                whole = f"{node.module}.{alias.name}"
                found.add((whole, "") if whole.removeprefix("ecanet.") in MODULES else (node.module or "", alias.name))
    ours = {(module, name) for module, name in found if module.split(".")[0] == "ecanet"}
    return {(module.removeprefix("ecanet").removeprefix("."), name) for module, name in ours}


@functools.cache
def menu_of(module: str) -> list[str] | None:
    """The value of ``__all__``."""
    for node in tree(path_of(module)).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


@functools.cache
def files_in_order(package: str) -> list[str]:
    """The files of ``package`` in the order in which its docstring names them."""
    children = [m for m in MODULES if m.startswith(f"{package}.") and "." not in m[len(package) + 1 :]]
    names = re.findall(r"`([a-z_]+)`", ast.get_docstring(tree(path_of(package))) or "")
    return [child for child in dict.fromkeys(f"{package}.{name}" for name in names) if child in children]


PACKAGES = [m for m in MODULES if m and path_of(m).name == "__init__.py"]


def violations(module: str, source: str) -> list[str]:
    """Imports in ``source``, the text of ``module``, that point upward or pass a front door."""
    found = []
    for other, name in sorted(imports_of(source)):
        if room_of(other) != room_of(module):
            found += [f"{other} is above"] if ROOMS.index(room_of(other)) <= ROOMS.index(room_of(module)) else []
            found += [] if by_the_door(other, name) else [f"{other}:{name} is behind the front door"]
            continue
        found += [f"{other} is above"] if above(module, other) else []
    return found


def by_the_door(module: str, name: str) -> bool:
    room, _, inside = module.partition(".")
    if inside and room in CORRIDORS:
        return "." not in inside and (not name or name in (menu_of(module) or ()))
    if name == "__version__":
        return True
    return (not inside and (not name or name in (menu_of(room) or (name,)))) or (
        not name and inside in (menu_of(room) or ())
    )


def above(module: str, other: str) -> bool:
    """Whether ``other``, of the same room, stands above ``module``, at the first folder where the two part."""
    a, b = module.split("."), other.split(".")
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if shared == len(a):
        return False  # a front door imports what is in its room
    if shared == len(b):
        return True  # who is inside does not come in by the door
    order = files_in_order(".".join(a[:shared]))
    return order.index(".".join(b[: shared + 1])) <= order.index(".".join(a[: shared + 1]))


def test_every_room_is_there_and_has_its_place():
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS) <= 19


@pytest.mark.parametrize("package", [p for p in PACKAGES if p])
def test_front_doors_list_their_files_in_reading_order(package):
    children = {m for m in MODULES if m.startswith(f"{package}.") and "." not in m[len(package) + 1 :]}
    assert set(files_in_order(package)) == children


def test_imports_point_downward_and_go_by_the_front_door():
    found = {module: violations(module, path_of(module).read_text()) for module in MODULES}
    assert {module: wrong for module, wrong in found.items() if wrong} == {}


def test_what_is_wrong_is_seen():
    assert violations("recipes.config", "from ecanet.training import run") == ["training is above"]
    assert violations("models.slots", "def f():\n    from ecanet.models.checkpoints import read_file") == [
        "models.checkpoints is above"
    ]
    assert violations("models.slots", "from ecanet.models import create_model") == ["models is above"]
    assert violations("ops.tail", "import ecanet") == [" is above"]
    assert violations("training.trainer", "from ecanet.data.augmentation import build_eval_transform") == [
        "data.augmentation:build_eval_transform is behind the front door"
    ]
    assert violations("inference.fusion", "from ecanet.ops import dispatch") == [
        "ops.dispatch: is behind the front door"
    ]
    assert violations("training.trainer", "from ecanet import data\nfrom ecanet.errors import ConfigError") == []
    assert violations("cli.compare", "from ecanet.studies.paper import run\nfrom ecanet.studies import cost") == []
    assert violations("cli.compare", "from ecanet.studies.paper.rows import Row") == [
        "studies.paper.rows:Row is behind the front door"
    ]


def test_floors():
    """A room's floor is the longest way down from it."""
    below = {
        room: {room_of(o) for m in MODULES if room_of(m) == room for o, _ in imports_of(path_of(m).read_text())}
        - {room}
        for room in ROOMS
    }
    floor: dict[str, int] = {}
    for room in reversed(ROOMS):
        floor[room] = 1 + max((floor[other] for other in below[room]), default=0)
    assert max(floor.values()) <= 10, floor


@pytest.fixture(scope="module")
def loaded():
    """Return the modules that a new process has loaded after ``import ecanet``, and after ``ecanet --help``."""
    code = """
import sys, ecanet
print("loaded", *sys.modules)
sys.argv = ["ecanet", "--help"]
from ecanet.__main__ import main
try:
    main()
except SystemExit as stop:
    print("stopped", stop.code)
print("loaded", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "stopped 0" in done.stdout.splitlines()
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("loaded ")]


def top(modules):
    return {name.partition(".")[0] for name in modules}


def test_import_is_cheap(loaded):
    assert "torch" in loaded[0]
    assert "torch._dynamo" not in loaded[0], "the compiler takes seconds"
    heavy = {"lightning", "torchvision", "matplotlib", "typer", "rich", "torchmetrics", "sklearn", "PIL", "timm"}
    assert not heavy & top(loaded[0])


def test_help_imports_nothing_heavier_than_torch(loaded):
    assert {"torch", "typer"} <= loaded[1]
    assert not {"lightning", "torchvision", "matplotlib", "torchmetrics", "sklearn", "jinja2", "timm"} & top(loaded[1])


def test_menus_are_sorted_and_true():
    menus = {module: menu_of(module) for module in MODULES}
    for module, names in menus.items():
        if names is not None:
            # as ruff sorts them: CONSTANTS, Classes, functions
            assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name)), module
            loaded = importlib.import_module(f"ecanet.{module}".rstrip("."))
            assert [name for name in names if not hasattr(loaded, name)] == [], module


def test_the_front_door_shows_all_that_is_public():
    modules = {name.partition(".")[0] for name in MODULES}
    public = {name for name in vars(ecanet) if not name.startswith("_")} - modules
    assert public == set(ecanet.__all__) - modules | (set(ecanet.__all__) & public)
    for name in ecanet.__all__:
        assert callable(getattr(ecanet, name))
