"""Options that several commands share, and how they are read."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ecanet.errors import ConfigError, DataError
from ecanet.recipes import ModelConfig, Recipe, parse_kernel_sizes, with_settings

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint, or a run's folder (its best one).", show_default=False)]
ModelName = Annotated[str | None, typer.Option("--model", help="Network: see `ecanet models`.", show_default=False)]
Attention = Annotated[str | None, typer.Option(help="none, eca, se, …", show_default=False)]
KernelSizes = Annotated[str | None, typer.Option(help="adaptive (default), official or 3,5,5,7.", show_default=False)]
DataName = Annotated[
    str | None, typer.Option("--data", help="digits, fashion-mnist, …, folder:PATH.", show_default=False)
]
DataDir = Annotated[str | None, typer.Option(help="Where the data's files are.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Epochs = Annotated[int | None, typer.Option(help="Times through the data.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting: --set data.workers=4.", metavar="KEY=VALUE", show_default=False),
]
OnCorrupt = Annotated[str, typer.Option(help="error, or skip: go on without unreadable files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def model_config(name: str | None, attention: str | None, kernel_sizes: str | None) -> ModelConfig | None:
    """The network that ``--model`` and its companions name; None without it."""
    if name is None:
        if attention or kernel_sizes:
            raise ConfigError("--attention and --kernel-sizes need --model; a run's checkpoint knows its own")
        return None
    return ModelConfig(
        name=name, attention=attention or "eca", kernel_sizes=parse_kernel_sizes(kernel_sizes or "adaptive")
    )


def parsed(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value that is not JSON is a text."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as --set data.workers=4")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """``recipe`` with ``changes``, values by dotted name."""
    return with_settings(recipe, changes)


def check_folder(out: Path | None) -> None:
    """Raise ConfigError where ``--out`` names a file, before any work is done for it."""
    for part in (out, *out.parents) if out is not None else ():
        if part.exists() and not part.is_dir():
            raise ConfigError(f"--out {out}: {part} is a file; give a folder")


def check_on_corrupt(choice: str) -> None:
    """Raise ConfigError unless ``choice`` is one."""
    if choice not in ("error", "skip"):
        raise ConfigError(f"--on-corrupt must be error or skip, got {choice!r}")


def skipped(problem: DataError, on_corrupt: str) -> None:
    """Say that a file is left out, or raise ``problem``."""
    if on_corrupt == "error":
        raise DataError(f"{problem}; --on-corrupt skip goes on without such files")
    print(f"skipped: {problem}", file=sys.stderr)
