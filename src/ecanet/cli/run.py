"""The commands that train and use a classifier: train, eval, predict, report, weights."""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ecanet import progress, recipes
from ecanet.cli.options import (
    AsJson,
    Attention,
    DataDir,
    DataName,
    Device,
    Epochs,
    KernelSizes,
    LoggerNames,
    ModelName,
    NoPreserve,
    OnCorrupt,
    Quiet,
    ReplaceKind,
    Settings,
    ValShare,
    Weights,
    Where,
    check_on_corrupt,
    choose_recipe,
    collect_changes,
    console,
    keep_names,
    model_changes,
    model_config,
    print_json,
    report_unreadable,
)
from ecanet.errors import ConfigError
from ecanet.recipes import with_settings

if TYPE_CHECKING:
    from ecanet.report import Report

RECIPE_HELP = f"{', '.join(recipes.RECIPES)}; or a data set (folder:PATH, …)."


def train(
    recipe: Annotated[str | None, typer.Argument(help=RECIPE_HELP, show_default=False)] = None,
    model: ModelName = None,
    attention: Attention = None,
    weights: Weights = None,
    kernel_sizes: KernelSizes = None,
    where: Where = None,
    replace: ReplaceKind = None,
    no_preserve: NoPreserve = False,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per device and step.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate at the base batch size.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default=False)] = None,
    data_dir: DataDir = None,
    val_share: ValShare = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory (runs/NAME-DATE).", show_default=False)] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.", show_default=False)] = None,
    auto_resume: Annotated[bool, typer.Option("--auto-resume", help="Start in --out, or go on there.")] = False,
    logger: LoggerNames = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a network: `ecanet train quickstart`.

    Any network: `ecanet train folder:photos --model torchvision:resnet50`.
    Small folders are fine-tuned from ImageNet weights, or --weights none.
    """
    changes = model_changes(
        model=model,
        attention=attention,
        kernel_sizes=kernel_sizes,
        where=where,
        replace=replace,
        no_preserve=no_preserve,
        weights=weights,
    ) | collect_changes(
        {
            "epochs": epochs,
            "data.batch_size": batch_size,
            "optimizer.learning_rate": learning_rate,
            "seed": seed,
            "data.root": data_dir,
            "data.val_share": val_share,
        },
        settings,
    )
    refuse_others(resume, changes, [recipe, out, auto_resume])

    def start() -> "Report":
        chosen = choose_recipe(recipe, changes) if resume is None else resume_recipe(resume, changes)
        from ecanet.training import run

        goes_on = "auto" if auto_resume else resume is not None
        return run(chosen, folder=resume or out, resume=goes_on, device=device, loggers=logger)

    show_results(start, as_json)


def refuse_others(resume: Path | None, changes: dict[str, object], others: list[object]) -> None:
    """Raise ConfigError if there is anything that the resumed run ``resume`` cannot take."""
    if resume is not None and (any(others) or set(changes) - {"epochs", "optimizer.learning_rate"}):
        raise ConfigError(
            "--resume takes everything from the run but --epochs and --learning-rate; leave out the recipe, other "
            "settings and --out"
        )


def show_results(make: "Callable[[], Report]", as_json: bool) -> None:
    """Call ``make``, which prints as it works; for JSON, that goes to standard error, and the results follow alone."""
    if not as_json:
        make()
        return
    with redirect_stdout(sys.stderr):
        made = make()
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only(print_json)({"folder": str(made.folder), **made.to_dict()})


def resume_recipe(run: Path, changes: Mapping[str, object]) -> recipes.Recipe:
    """Return the recipe of the ``run`` with ``changes``."""
    from ecanet.training import read_recipe

    return with_settings(read_recipe(run), changes)


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint file or run directory.", show_default=False)
    ] = None,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    on_corrupt: Annotated[
        str | None, typer.Option(help="Unreadable files: error or skip.", show_default="as in the run")
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint on held-out images.

    The data set is the run's, or --data.
    Weights of others: --model NAME --weights default --data folder:PATH.
    """
    from ecanet.training import evaluate

    check_one_source(checkpoint, weights)
    if model is None and weights not in (None, "default"):
        checkpoint, weights = weights, None  # a file that a run has written names its network
    metrics = evaluate(
        checkpoint,
        model=model_config(model, attention, kernel_sizes, weights),
        data_name=data,
        data_dir=data_dir,
        on_corrupt=on_corrupt,
        device=device,
    )
    if as_json:
        print_json(metrics)
    else:
        console.print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def predict(
    paths: Annotated[list[str], typer.Argument(help="A run, and images or folders.", metavar="[RUN] IMAGES...")],
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    on_corrupt: OnCorrupt = "error",
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Classify images: the most likely classes, with probabilities.

    Without a run: --model torchvision:mobilenet_v2 --weights default.
    Weights that `ecanet train` did not make know ImageNet's classes, or those of --data.
    """
    check_on_corrupt(on_corrupt)
    from ecanet import networks, training

    checkpoint, *images = (None, *paths) if weights else paths
    if model is None and weights not in (None, "default"):
        checkpoint, weights = weights, None
    if not images:
        raise ConfigError("no images: give a run and images, or --model, --weights and images")
    found_device = networks.find_device(device)
    files = [file for path in images for file in training.image_files(path)]
    config = model_config(model, attention, kernel_sizes, weights)
    task = training.restore(checkpoint, model=config, data_name=data, data_dir=data_dir)
    predictions: list[training.Prediction] = []
    answers = training.predict(task, files, top=top, device=found_device)
    for answer in progress.track(answers, "images", len(files)):
        if isinstance(answer, training.Prediction):
            predictions.append(answer)
        else:
            report_unreadable(answer, on_corrupt)
    if as_json:
        print_json(
            [{"path": p.path, "classes": [{"name": n, "probability": q} for n, q in p.classes]} for p in predictions]
        )
        return
    table = Table("image", f"most likely of {len(task.spec.class_names)} classes")
    for p in predictions:
        table.add_row(p.path, "  ".join(f"{name} {probability:.1%}" for name, probability in p.classes))
    keep_names(table)
    console.print(table)


def report(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.", show_default=False)],
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a finished run's report again.

    The last checkpoint is evaluated on the run's held-out images.
    """
    from ecanet.training import remake_report

    show_results(lambda: remake_report(run, device=device), as_json)


def weights(
    run: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="NAME.safetensors or NAME.pth.", show_default=False)],
    which: Annotated[str, typer.Option(help="best or last epoch.")] = "best",
    as_json: AsJson = False,
) -> None:
    """Write a run's weights alone, without optimizer state.

    `eval`, `predict` and `--weights` take the file; it names its network.
    """
    from ecanet.training import write_weights

    written = write_weights(run, out, which=which)
    if as_json:
        print_json(asdict(written))
    else:
        console.print(str(written))  # of a dataclass itself, rich prints the fields


def check_one_source(checkpoint: str | None, weights: str | None) -> None:
    """Raise ConfigError unless there is a checkpoint or ``--weights``, and not both."""
    if checkpoint is not None and weights is not None:
        raise ConfigError(f"{checkpoint} and --weights {weights} are two sources of weights; give one of them")
    if checkpoint is None and weights is None:
        raise ConfigError("give a checkpoint or a run, or --model and --weights")
