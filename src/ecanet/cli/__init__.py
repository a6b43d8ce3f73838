"""The command line: each command turns its options into one function call and prints the result.

Read downward: `run` (train, eval, predict, report, weights), `detect`, `models`, `compare` (cost, paper, ablate,
inspect), `app`, `bench`, `deploy` (export), `slim`, `push`, `shards` (pack, index, check), `doctor`, `completion`,
`options` (the options that several commands share). Heavy packages are imported inside the commands, so ``--help`` is
quick. A user's mistake raises an `EcanetError`, which ``ecanet.__main__`` prints as one line.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from ecanet import __version__
from ecanet.cli.app import app as try_in_browser
from ecanet.cli.bench import bench
from ecanet.cli.compare import ablate, cost, inspect, paper
from ecanet.cli.completion import completion
from ecanet.cli.deploy import export
from ecanet.cli.detect import detect
from ecanet.cli.doctor import doctor
from ecanet.cli.models import models
from ecanet.cli.options import console
from ecanet.cli.push import push
from ecanet.cli.run import evaluate, predict, report, train, weights
from ecanet.cli.shards import app as shards
from ecanet.cli.slim import slim

__all__ = ["TASKS", "app"]

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "detect": detect,
    "report": report,
    "weights": weights,
    "push": push,
    "models": models,
    "cost": cost,
    "paper": paper,
    "ablate": ablate,
    "inspect": inspect,
    "app": try_in_browser,
    "bench": bench,
    "export": export,
    "slim": slim,
    "doctor": doctor,
    "completion": completion,
}
"""The commands, in the order in which ``--help`` lists them."""

TASKS = {
    "put gates into my network": "ecanet models timm:convnext_tiny --attach eca",
    "fine-tune on my photographs": "ecanet train folder:photos",
    "compare attention fairly": "ecanet ablate --variants none,eca-adaptive,se",
    "reproduce the paper": "ecanet paper 3",
    "detect objects": "ecanet train scenes",
    "measure the speed": "ecanet bench --quick",
    "take a network elsewhere": "ecanet export runs/NAME --to onnx",
    "look inside the gates": "ecanet inspect runs/NAME",
}
"""What people come for, and the command that it begins with; shown by `ecanet` alone."""

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(shards, name="shards")


def print_version(requested: bool) -> None:
    """Print the version and exit if ``--version`` is given."""
    if requested:
        console.print(f"ecanet {__version__}")
        raise typer.Exit


@app.callback()
def ecanet(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Channel attention for convolutional networks: train, evaluate, compare."""
    if context.invoked_subcommand is None:
        width = max(map(len, TASKS))
        lines = "\n".join(f"  {task:{width}}  {command}" for task, command in TASKS.items())
        console.print(
            f"What do you want to do?\n\n{lines}\n\nAll commands: ecanet --help. Is all well here? ecanet doctor"
        )
