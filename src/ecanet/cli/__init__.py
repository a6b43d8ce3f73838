"""The commands: each one turns its options into one call, and prints what comes back.

Read downward: `compare` (cost, paper, ablate, inspect), `bench`, `detect`, `options` (what commands share). What is
heavy is imported inside the commands, so that ``--help`` is quick. A mistake is an `EcanetError`, which
``ecanet.__main__`` prints as one line.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ecanet import __version__, recipes
from ecanet.cli import bench as cli_bench
from ecanet.cli import compare as cli_compare
from ecanet.cli import detect as cli_detect
from ecanet.cli.options import (
    AsJson,
    Attention,
    Checkpoint,
    DataDir,
    DataName,
    Device,
    Epochs,
    KernelSizes,
    ModelName,
    OnCorrupt,
    Settings,
    changed,
    check_on_corrupt,
    console,
    model_config,
    parsed,
    skipped,
)
from ecanet.errors import ConfigError
from ecanet.recipes import parse_kernel_sizes

__all__ = ["app"]

app = typer.Typer(
    help="Channel attention for convolutional networks: train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_compare.app)
app.add_typer(cli_bench.app)
app.add_typer(cli_detect.app)


@app.callback(invoke_without_command=True)
def ecanet(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Channel attention for convolutional networks: train, evaluate, predict."""
    if version:
        console.print(f"ecanet {__version__}")


@app.command()
def train(
    name: Annotated[
        str | None,
        typer.Argument(
            help=f"Recipe ({', '.join(recipes.RECIPES)}) or data (digits, …, folder:PATH).", show_default=False
        ),
    ] = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per device and step.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak, for the recipe's base batch.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides all that is random.", show_default=False)] = None,
    data_dir: DataDir = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME-DATE")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Train a network: `ecanet train quickstart`."""
    changes = {
        "model.name": model,
        "model.attention": attention,
        "model.kernel_sizes": None if kernel_sizes is None else parse_kernel_sizes(kernel_sizes),
        "epochs": epochs,
        "data.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "seed": seed,
        "data.root": data_dir,
    }
    changes = {key: value for key, value in changes.items() if value is not None} | parsed(settings or [])
    if resume is not None:
        if name or changes or out:
            raise ConfigError("--resume takes everything from the run; leave out the recipe, other settings and --out")
        from ecanet.training import read_recipe

        recipe = read_recipe(resume)
    else:
        if name is None:
            raise ConfigError("say what to train: a recipe or data, such as `ecanet train quickstart`, or --resume RUN")
        recipe = changed(recipes.find(name), changes)
    from ecanet.training import run

    run(recipe, folder=resume or out, resume=resume is not None, device=device)


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    on_corrupt: Annotated[
        str | None, typer.Option(help="error or skip unreadable files.", show_default="the run's")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint on held-out images: its run's, or others."""
    from ecanet.training import evaluate

    metrics = evaluate(
        checkpoint,
        model=model_config(model, attention, kernel_sizes),
        data_name=data,
        data_dir=data_dir,
        on_corrupt=on_corrupt,
        device=device,
    )
    if as_json:
        print(json.dumps(metrics))
    else:
        console.print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


@app.command()
def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 5,
    on_corrupt: OnCorrupt = "error",
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Name what is in image files: the likeliest classes with their probabilities."""
    check_on_corrupt(on_corrupt)
    from ecanet import networks, training

    found_device = networks.find_device(device)
    files = [file for path in images for file in training.image_files(path)]
    task = training.restore(
        checkpoint, model=model_config(model, attention, kernel_sizes), data_name=data, data_dir=data_dir
    )
    found: list[training.Prediction] = []
    for answer in training.predict(task, files, top=top, device=found_device):
        if isinstance(answer, training.Prediction):
            found.append(answer)
        else:
            skipped(answer, on_corrupt)
    if as_json:
        rows = [{"path": p.path, "classes": [{"name": n, "probability": q} for n, q in p.classes]} for p in found]
        print(json.dumps(rows, indent=2))
        return
    table = Table("image", f"likeliest of {len(task.spec.class_names)} classes")
    for p in found:
        table.add_row(p.path, "  ".join(f"{name} {probability:.1%}" for name, probability in p.classes))
    console.print(table)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One of them, with its parameters.", show_default=False)] = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    attach: Annotated[
        str | None,
        typer.Option(help="Where this attention would go in a network.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the networks and their parameters, show one with every attention, or --attach one to another's."""
    from ecanet import list_attentions, models

    if attach is not None:
        _attached(name, attach, attention, kernel_sizes, as_json)
        return

    sizes = parse_kernel_sizes(kernel_sizes or "adaptive")
    networks = [name] if name else models.list_models()
    attentions = [attention] if attention else list_attentions() if name else ["none", "eca"]
    rows = [{"model": n, "attention": a, "parameters": _parameters(n, a, sizes)} for n in networks for a in attentions]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "attention", "parameters")
    table.columns[2].justify = "right"
    for row in rows:
        table.add_row(row["model"], row["attention"], f"{row['parameters']:,}")
    console.print(table)


def _attached(name: str | None, attach: str, attention: str | None, kernel_sizes: str | None, as_json: bool) -> None:
    """The sites that `ecanet.attach` finds in the network called ``name``."""
    if name is None or attention is not None:
        raise ConfigError("--attach takes one network and names its attention: ecanet models resnet50 --attach eca")
    from dataclasses import asdict

    from ecanet import networks
    from ecanet.surgery import attach as attach_to
    from ecanet.surgery import attached

    options: dict[str, object] = {} if kernel_sizes is None else {"kernel_sizes": parse_kernel_sizes(kernel_sizes)}
    model = networks.find(name, **({"attention": "none"} if networks.is_ours(name) else {}))
    parameters = sum(p.numel() for p in model.parameters())
    report = attached(attach_to(model, attach, **options))  # pyright: ignore[reportArgumentType]
    if as_json:
        sites = [asdict(site) for site in report]
        print(json.dumps({"model": name, "parameters": parameters, "sites": sites}, indent=2))
        return
    console.print(str(report))
    console.print(f"{name}: {parameters:,} parameters, {sum(site.parameters for site in report):,} added")


def _parameters(name: str, attention: str, kernel_sizes: Any) -> int:
    """Counted on a network without memory for its weights."""
    import torch

    from ecanet import models

    with torch.device("meta"):
        network = models.create_model(name, attention=attention, kernel_sizes=kernel_sizes)
    return sum(p.numel() for p in network.parameters())
