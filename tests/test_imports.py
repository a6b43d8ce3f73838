"""The page reads downward, opens fast, and its menus are true."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ecanet

PACKAGE = Path(ecanet.__file__).parent

# top to bottom, as docs and readers take it; "" is ecanet/__init__.py, the front door. A module imports only what
# stands below it. A new module goes where that stays true.
READING_ORDER = [
    module
    for line in (
        "__main__ cli cli_compare cli_detect cli_inspect cli_bench cli_options",
        "bench_pages bench bench_check bench_layers bench_networks",
        "paper_pages paper paper_runs paper_detection paper_rows ablate_pages ablate ablate_rows inspect_pages",
        "train detect trained recipes progress",
        "report figures tasks tasks_detection",
        "data data.boxes data.scenes data.annotations data.images data.sources data.pictures config",
        "fusion inference inference_parts inspect export measure traffic",
        "cost models.detection models models.checkpoints models.mobilenet models.resnet models.tail models.placement",
        "models.slots attach.preview attach attach.replace attach.kernels attach.folding attach.report attach.example",
        "attach.sites attach.branches attach.watch attach.hooks",
        "attention attention.long_range attention.others attention.gates attention.base",
        "ops ops.proof ops.expansion ops.fused ops.kernels ops.lean ops.tail ops.nodes",
        "ops.passes ops.reference ops.calls errors",
    )
    for module in line.split()
]
READING_ORDER.insert(READING_ORDER.index("config") + 1, "")

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    for path in PACKAGE.rglob("*.py")
)


def path_of(module: str) -> Path:
    inside = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")


def imports_of(source: str) -> set[str]:
    """Modules of ecanet that ``source`` imports, anywhere in it, without the leading ``ecanet.``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say the whole name"
            # `from ecanet import data` means a module where there is one, and a name in the front door otherwise
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("ecanet.") in MODULES}
            found |= modules | ({node.module or ""} if names - modules else set())
    return {name.removeprefix("ecanet").removeprefix(".") for name in found if name.split(".")[0] == "ecanet"}


def upward(module: str, source: str) -> list[str]:
    place = READING_ORDER.index(module)
    return [other for other in sorted(imports_of(source)) if READING_ORDER.index(other) <= place]


def test_every_module_has_its_place():
    assert not set(MODULES) - set(READING_ORDER)
    assert len(set(READING_ORDER)) == len(READING_ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_page(module):
    assert upward(module, path_of(module).read_text()) == []


def test_an_upward_import_is_seen():
    assert upward("config", "from ecanet import train") == ["train"]
    assert upward("models.slots", "def f():\n    from ecanet.models.checkpoints import read_file") == [
        "models.checkpoints"
    ]
    assert upward("ops", "import ecanet") == [""]
    assert upward("train", "from ecanet import data, tasks\nfrom ecanet.errors import ConfigError") == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_cheap():
    loaded = run_python("import sys, ecanet; print(*{m.partition('.')[0] for m in sys.modules})").stdout.split()
    assert "torch" in loaded
    heavy = {"lightning", "torchvision", "matplotlib", "typer", "rich", "torchmetrics", "sklearn", "PIL", "timm"}
    assert not heavy & set(loaded)


def test_help_imports_nothing_heavier_than_torch():
    code = """
import sys
sys.argv = ["ecanet", "--help"]
from ecanet.__main__ import main
try:
    main()
except SystemExit as stop:
    print("stopped", stop.code)
print("loaded", *{m.partition(".")[0] for m in sys.modules})
"""
    lines = run_python(code).stdout.splitlines()
    assert "stopped 0" in lines
    loaded = set(lines[-1].split())
    assert {"loaded", "torch", "typer"} <= loaded
    assert not {"lightning", "torchvision", "matplotlib", "torchmetrics", "sklearn", "jinja2", "timm"} & loaded


@pytest.mark.parametrize("module", MODULES)
def test_menus_are_sorted_and_true(module):
    tree = ast.parse(path_of(module).read_text())
    menus = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]
    ]
    if not menus:
        return
    names = ast.literal_eval(menus[0])
    # as ruff sorts them: CONSTANTS, Classes, functions
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    loaded = importlib.import_module(f"ecanet.{module}".rstrip("."))
    assert [name for name in names if not hasattr(loaded, name)] == []


def test_the_front_door_shows_all_that_is_public():
    modules = {name.partition(".")[0] for name in MODULES}
    public = {name for name in vars(ecanet) if not name.startswith("_")} - modules
    assert public == set(ecanet.__all__) - modules | (set(ecanet.__all__) & public)
    for name in ecanet.__all__:
        assert callable(getattr(ecanet, name))
