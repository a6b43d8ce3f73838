"""The project's source files and their definitions, for the tests that read code."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ecanet"
ROOMS = sorted(path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py")
ROOMS = [room for room in ROOMS if room != "__pycache__"]
"""The folders of the package and the modules beside them."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef | ast.Module


def files_of(room: str) -> list[Path]:
    """Return the Python files of a room."""
    return sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]


@cache
def tree(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[Function]:
    """Yield every function of a file, methods and inner functions included."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def public_functions(path: Path) -> Iterator[Function]:
    """Yield the functions and methods of a file whose names are public; functions inside functions are not."""
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    for node in [*tree(path).body, *(inner for outer in classes for inner in outer.body)]:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node


@cache
def exported_names() -> frozenset[str]:
    """Return the names in ``__all__`` of the package and of its rooms."""
    found: set[str] = set()
    for path in PACKAGE.rglob("__init__.py"):
        for node in tree(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= set(ast.literal_eval(node.value))
    return frozenset(found)


@cache
def docstrings(path: Path) -> list[tuple[int, str]]:
    """Return the line and the text of every docstring of a file."""
    return [
        (node.body[0].lineno, text)
        for node in ast.walk(tree(path))
        if isinstance(node, Definition) and (text := ast.get_docstring(node))
    ]


def name(path: Path, line: int | None = None) -> str:
    """Return a file's path from the project's root, with a line as in ``src/ecanet/errors.py:3``."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if line is None else f"{relative}:{line}"
