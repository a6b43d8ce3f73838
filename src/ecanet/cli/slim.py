"""The command `ecanet slim`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from ecanet import progress
from ecanet.cli.options import (
    AsJson,
    Checkpoint,
    DataDir,
    Device,
    Quiet,
    check_folder,
    console,
    keep_names,
    notices,
    print_json,
)
from ecanet.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ecanet.data import ClassificationData
    from ecanet.training import Classification

FITTED = 8192
"""Training images that constants are fitted to and tuned on."""


def slim(
    checkpoint: Checkpoint,
    budget: Annotated[float, typer.Option(help="Decisions that may change.")] = 0.01,
    images: Annotated[Path | None, typer.Option(help="Folder of unlabeled images.", show_default="held-out")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Folder of images that count too.", show_default=False),
    ] = None,
    finetune: Annotated[float, typer.Option(help="Epochs of training after it.")] = 0,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("slim"),
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fold gates that barely vary into other layers.

    Constants are fitted to the run's training images; held-out images judge.
    Decisions are compared without labels; the budget holds with 95 % confidence.
    Writes OUT/slim.json and OUT/slim.pth, which eval and predict take.
    """
    check_folder(out)
    from ecanet import deploy, networks, training
    from ecanet.report import write_file

    to = networks.find_device(device)
    task = training.restore(checkpoint, data_dir=data_dir)
    if not isinstance(task, training.Classification):
        raise ConfigError(
            f"{task.recipe.model.name} is a detector, whose decisions this command does not know; use "
            f"ecanet.slim(model, images, decide=) in Python"
        )
    task = task.to(to)
    held_out = cast("ClassificationData", training.build_data(task.recipe, train=False, split=task.split))
    shown = read_folder(task, images) if images is not None else [x for x, _ in iterate_batches(task, held_out, to)]
    learned = None if images is not None else read_training_images(task)
    folders = [name.removeprefix("folder:") for name in also or ()]
    others = {name: read_folder(task, Path(name)) for name in folders}
    before = count_correct(task, held_out, to)
    task.model, report = deploy.slim(task.model, shown, budget=budget, fit_images=learned, also=others)
    accuracy = {"before": before, "folded": count_correct(task, held_out, to)}
    if finetune:
        training.fine_tune(task, finetune, device=to)
        accuracy["fine-tuned"] = count_correct(task, held_out, to)
    content = {"checkpoint": checkpoint, **report.to_dict(), "top1": accuracy}
    try:
        out.mkdir(parents=True, exist_ok=True)
        training.write_network(task, out / "slim.pth")
        write_file(out / "slim.json", (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); give another --out, or make room") from None
    if as_json:
        print_json(content)
        return
    table = Table("gate", "attention", "spread", "divergence", "changed (limit)", "gate is")
    for gate, row in zip(report.gates, report.rows(), strict=True):
        table.add_row(*row[:-1], "folded" if gate.folded else "kept")
    keep_names(table)
    console.print(table)
    for gate in report.gates:
        if not gate.folded:
            console.print(f"kept {gate.name}: {gate.reason}")
    for line in report.lines():
        console.print(line)
    console.print("top1 " + ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items()))
    console.print(f"report {out / 'slim.json'}, weights {out / 'slim.pth'}")


def iterate_batches(
    task: "Classification", data: "ClassificationData", device: "torch.device"
) -> "Iterator[tuple[Tensor, Tensor]]":
    """Yield held-out images as the network of ``task`` takes them, and their labels."""
    batches = data.val_dataloader()
    for batch in progress.track(batches, "held-out batches"):
        x, labels = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        yield x.expand(-1, task.channels, -1, -1).to(device), labels.to(device)


def read_training_images(task: "Classification") -> "Tensor | None":
    """Return images that the run of ``task`` was trained on, without augmentation; None if they are not at hand."""
    from ecanet import training

    try:
        data = cast("ClassificationData", training.build_data(task.recipe, split=task.split))
        found, _ = training.sample_images(data, FITTED, train=True)
    except DataError as error:
        notices.print(f"no training images ({error}): half of the held-out images fit the constants, and half judge")
        return None
    return found.expand(-1, task.channels, -1, -1)


def read_folder(task: "Classification", folder: Path) -> "list[Tensor]":
    """Return the images in ``folder``, in any layout, one in each batch, as the network of ``task`` takes them."""
    from ecanet import training
    from ecanet.data import build_eval_transform, read_image

    transform, spec = build_eval_transform(task.spec), task.spec
    pictures = (
        read_image(path, spec.channels) for path in progress.track(training.image_files(folder), f"reading {folder}")
    )
    return [spec.normalize(transform(picture)[None]).expand(-1, task.channels, -1, -1) for picture in pictures]


def count_correct(task: "Classification", data: "ClassificationData", device: "torch.device") -> float:
    """Return the share of held-out images, in percent, whose class ``task`` tells correctly."""
    import torch

    correct = count = 0
    with torch.no_grad():
        for x, labels in iterate_batches(task, data, device):
            correct, count = correct + int((task(x).argmax(1) == labels).sum()), count + len(labels)
    return 100 * correct / max(1, count)
