"""The options that several commands share, and the functions that read them."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ecanet import progress
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import ModelConfig, Recipe, find, parse_kernel_sizes, with_settings

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

notices = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
"""For what is said while a command works whose result is JSON."""

Checkpoint = Annotated[str, typer.Argument(help="Checkpoint file or run directory.", show_default=False)]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="NAME, timm:NAME, torchvision:NAME, FILE.py:NAME.", show_default=False),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="default, a checkpoint's path, or none.", show_default=False)
]
Where = Annotated[str | None, typer.Option("--where", help='Modules with gates: "layer4.*".', show_default=False)]
ReplaceKind = Annotated[str | None, typer.Option("--replace", help="se or eca: exchange these.", show_default=False)]
NoPreserve = Annotated[bool, typer.Option("--no-preserve", help="Leave gates as initialised.")]
Attention = Annotated[str | None, typer.Option("--attention", help="none, eca, se, cbam, …", show_default=False)]
KernelSizes = Annotated[
    str | None, typer.Option("--kernel-sizes", help="adaptive (default), official or 3,5,5,7.", show_default=False)
]
DataName = Annotated[str | None, typer.Option("--data", help="Data set: digits, folder:PATH, …", show_default=False)]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Directory of the data files.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
LoggerNames = Annotated[
    str | None, typer.Option("--logger", help="tensorboard,csv,wandb,mlflow or none.", show_default=False)
]
ValShare = Annotated[
    float | None,
    typer.Option("--val-share", help="Share held out without val/ (0.2).", show_default=False),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Number of epochs.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Other setting: data.workers=4.", metavar="KEY=VALUE", show_default=False),
]
OnCorrupt = Annotated[str, typer.Option("--on-corrupt", help="Unreadable files: error or skip.")]


def _set_bars(quiet: bool) -> None:
    progress.set_shown(not quiet)


Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.", callback=_set_bars)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def model_config(
    name: str | None, attention: str | None = None, kernel_sizes: str | None = None, weights: str | None = None
) -> ModelConfig | None:
    """Return the network that ``--model`` and the options beside it describe; None without ``--model``.

    Another library's network with its own weights is taken as it is, without gates, unless ``--attention`` asks for
    them; this library's has the attention that the weights were trained with.

    Raises:
        ConfigError: one of the others is given without ``--model``.
    """
    if name is None:
        if attention or kernel_sizes or weights:
            raise ConfigError(
                "--attention, --kernel-sizes and --weights need --model; a run's checkpoint holds its own"
            )
        return None
    if attention is None and ":" in name:
        attention = "none"
    values = {
        "attention": attention,
        "kernel_sizes": None if kernel_sizes is None else parse_kernel_sizes(kernel_sizes),
    }
    config = ModelConfig(name=name, weights=None if weights == "none" else weights)
    return config.but(**{key: value for key, value in values.items() if value is not None})


def model_changes(
    *,
    model: str | None,
    attention: str | None,
    kernel_sizes: str | None = None,
    where: str | None = None,
    replace: str | None = None,
    no_preserve: bool = False,
    weights: str | None = None,
) -> dict[str, object]:
    """Return the options of a network as changes of a recipe; ``--weights none`` is a change, too."""
    given: dict[str, object] = {
        "model.name": model,
        "model.attention": attention,
        "model.kernel_sizes": None if kernel_sizes is None else parse_kernel_sizes(kernel_sizes),
        "model.where": where,
        "model.replace": replace,
        "model.preserve": False if no_preserve else None,
        "model.weights": weights,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    if weights == "none":
        changes["model.weights"] = None
    return changes


def choose_recipe(name: str | None, changes: Mapping[str, object]) -> Recipe:
    """Return the recipe ``name`` with ``changes``; say so where it is fine-tuning and nobody has asked for it."""
    if name is None:
        raise ConfigError("give a recipe or a data set, such as `ecanet train quickstart`, or --resume RUN")
    scratch = "model.weights" in changes and changes["model.weights"] is None
    chosen = with_settings(find(name, scratch=scratch), changes)
    if chosen.name == "finetune" and name != "finetune":
        console.print(f"{name} is small: fine-tuning from pretrained weights; --weights none trains from scratch")
    return chosen


def collect_changes(options: Mapping[str, object], settings: Sequence[str] | None) -> dict[str, object]:
    """Return the options that are not None, and the ``--set`` pairs, which win."""
    return {key: value for key, value in options.items() if value is not None} | parse_settings(settings or ())


def parse_settings(settings: Sequence[str]) -> dict[str, object]:
    """Return ``KEY=VALUE`` pairs as a dictionary. A value that is not JSON is a string.

    >>> parse_settings(["data.workers=4", "name=first"])
    {'data.workers': 4, 'name': 'first'}

    Raises:
        ConfigError: a setting has no ``=``.
    """
    pairs: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as --set data.workers=4")
        try:
            pairs[key] = json.loads(text)
        except json.JSONDecodeError:
            pairs[key] = text
    return pairs


def split(text: str | None) -> list[str]:
    """Return the comma-separated names in ``text``, none for None.

    >>> split("eca, se")
    ['eca', 'se']
    """
    return [name.strip() for name in text.split(",")] if text else []


def name_network(name: str) -> str:
    """Return the network's name. The file of ``FILE.py:FACTORY`` may run, since the command names it."""
    from ecanet import networks

    if networks.find_library(name)[0] == "file":
        networks.trust(name)
    return name


def check_folder(out: Path | None) -> None:
    """Raise ConfigError if ``--out`` or one of its parents is a file. Call it before long work."""
    for path in (out, *out.parents) if out is not None else ():
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {out}: {path} is a file; give a directory")


def check_on_corrupt(choice: str) -> None:
    """Raise ConfigError unless ``choice`` is "error" or "skip"."""
    if choice not in ("error", "skip"):
        raise ConfigError(f"--on-corrupt must be error or skip, got {choice!r}")


def report_unreadable(problem: DataError, on_corrupt: str) -> None:
    """Print on standard error that a file is skipped, or raise ``problem`` if ``--on-corrupt`` is "error"."""
    if on_corrupt == "error":
        raise DataError(f"{problem}; --on-corrupt skip leaves out such files")
    print(f"skipped: {problem}", file=sys.stderr)


def keep_names(table: Table) -> None:
    """Show every name in the first column whole: on one line if a third of the terminal is wide enough for it."""
    names = table.columns[0]
    names.no_wrap = all(len(str(name)) <= console.width // 3 for name in names.cells)
    names.overflow = "fold"


def print_json(value: object) -> None:
    """Print ``value`` as indented JSON on standard output; JSON has no NaN and no infinity, so they become null."""
    # Python writes NaN and Infinity, and calls parse_constant for them when it reads.
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    print(json.dumps(plain, indent=2))
