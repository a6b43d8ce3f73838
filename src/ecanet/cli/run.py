"""The commands that train and use a classifier: train, eval, predict."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ecanet import recipes
from ecanet.cli.options import (
    AsJson,
    Attention,
    Checkpoint,
    DataDir,
    DataName,
    Device,
    Epochs,
    Images,
    KernelSizes,
    ModelName,
    OnCorrupt,
    Settings,
    check_on_corrupt,
    collect_changes,
    console,
    model_config,
    print_json,
    report_unreadable,
)
from ecanet.errors import ConfigError
from ecanet.recipes import parse_kernel_sizes, with_settings

RECIPE_HELP = f"Recipe ({', '.join(recipes.RECIPES)}) or data set (digits, folder:PATH, …)."


def train(
    recipe: Annotated[str | None, typer.Argument(help=RECIPE_HELP, show_default=False)] = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per device and step.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate at the base batch size.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default=False)] = None,
    data_dir: DataDir = None,
    val_share: Annotated[
        float | None,
        typer.Option(help="Share to hold out of a folder without val/ (default 0.2).", show_default=False),
    ] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME-DATE")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Train a network: `ecanet train quickstart`."""
    changes = collect_changes(
        {
            "model.name": model,
            "model.attention": attention,
            "model.kernel_sizes": None if kernel_sizes is None else parse_kernel_sizes(kernel_sizes),
            "epochs": epochs,
            "data.batch_size": batch_size,
            "optimizer.learning_rate": learning_rate,
            "seed": seed,
            "data.root": data_dir,
            "data.val_share": val_share,
        },
        settings,
    )
    if resume is not None:
        if recipe or changes or out:
            raise ConfigError("--resume takes everything from the run; leave out the recipe, other settings and --out")
        from ecanet.training import read_recipe

        chosen = read_recipe(resume)
    else:
        if recipe is None:
            raise ConfigError("give a recipe or a data set, such as `ecanet train quickstart`, or --resume RUN")
        chosen = with_settings(recipes.find(recipe), changes)
    from ecanet.training import run

    run(chosen, folder=resume or out, resume=resume is not None, device=device)


def evaluate(
    checkpoint: Checkpoint,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    on_corrupt: Annotated[
        str | None, typer.Option(help="Unreadable files: error or skip.", show_default="as in the run")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint on held-out images.

    The data set is the run's, or --data.
    Weights that `ecanet train` did not make need --model and --data.
    """
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
        print_json(metrics)
    else:
        console.print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def predict(
    checkpoint: Checkpoint,
    images: Images,
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    on_corrupt: OnCorrupt = "error",
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images: the most likely classes, with probabilities.

    Weights that `ecanet train` did not make need --model and --data.
    """
    check_on_corrupt(on_corrupt)
    from ecanet import networks, training

    found_device = networks.find_device(device)
    files = [file for path in images for file in training.image_files(path)]
    task = training.restore(
        checkpoint, model=model_config(model, attention, kernel_sizes), data_name=data, data_dir=data_dir
    )
    predictions: list[training.Prediction] = []
    for answer in training.predict(task, files, top=top, device=found_device):
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
    console.print(table)
