"""The command `ecanet export`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ecanet.cli.options import (
    AsJson,
    Attention,
    KernelSizes,
    Quiet,
    Weights,
    console,
    model_config,
    name_network,
    print_json,
)
from ecanet.errors import ConfigError
from ecanet.models import is_detector

if TYPE_CHECKING:
    from torch import nn

    from ecanet.deploy import ExportReport, Int8Report
    from ecanet.networks import Preprocessing
    from ecanet.recipes import ModelConfig

CALIBRATION, HELD_OUT = 512, 10_000
"""Training images that give the ranges of int8, and held-out images that measure it, at most."""

ENDINGS = {
    "onnx": ".onnx",
    "onnxruntime": "-onnxruntime.onnx",  # not the name of the file for onnx, which it would replace
    "openvino": ".xml",
    "executorch": ".pte",
    "torch-export": ".pt2",
    "torchscript": ".pt",
}
"""Ends of the names of files, by their targets."""


def export(
    source: Annotated[str, typer.Argument(metavar="RUN|NETWORK", help="Run directory, checkpoint or network's name.")],
    to: Annotated[str, typer.Option("--to", help="Runtime: onnx, openvino, …")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="next to the run")] = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the example's batch.")] = 1,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels.", show_default="the network's own")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise, with accuracy before and after.")] = False,
    images: Annotated[
        str | None, typer.Option("--images", help="Data for --int8: folder:PATH, …", show_default="the run's")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not run the file.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained network for another runtime.

    --to onnx, onnxruntime (on CPUs, one image size), openvino, executorch, torch-export or torchscript.
    Each runtime gets the form of the gates that it runs fast.
    The file is run there: its outputs, operations and time stand in the report.
    """
    import torch

    from ecanet import deploy

    if to not in ENDINGS:
        raise ConfigError(f"--to must be one of {', '.join(ENDINGS)}, got {to!r}")
    if int8 or images is not None:
        if not int8 or no_check or batch_size != 1 or image_size is not None:
            raise ConfigError("--images is for --int8, which takes no --batch-size, --image-size or --no-check")
        if to not in deploy.QUANTIZERS:
            raise ConfigError(f"there is no int8 for {to}; give --to {' or --to '.join(deploy.QUANTIZERS)}")
        named = not Path(source).exists()
        network = model_config(name_network(source), attention, kernel_sizes, weights) if named else None
        place = name_file(source, ENDINGS[to])
        path = out or place.with_stem(f"{place.stem}-int8")
        check_is_other(path, source)
        show(quantize(source, network, path, to, images), as_json)
        return
    path = out or name_file(source, ENDINGS[to])
    check_is_other(path, source)
    model, classes, expected = load(source, attention, kernel_sizes, weights)
    side = image_size or expected.size
    detects = is_detector(model)
    draw = torch.rand if detects else torch.randn
    shape = (expected.channels, side, side) if detects else (batch_size, expected.channels, side, side)
    try:
        x = draw(shape, generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:  # so PyTorch says that memory is short
        raise ConfigError(
            f"there is no memory for an example of {'x'.join(map(str, shape))}; give a smaller "
            f"--image-size or --batch-size"
        ) from error
    example: object = [x] if detects else x
    report = deploy.export(
        model, path, target=to, example=example, check=not no_check, classes=classes, preprocessing=expected
    )
    show(report, as_json)


def show(report: "ExportReport | Int8Report", as_json: bool) -> None:
    """Print ``report`` as a table, or as JSON."""
    if as_json:
        print_json(report.to_dict())
        return
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in report.list_rows():
        table.add_row(name, value)
    console.print(table)


def quantize(source: str, network: "ModelConfig | None", path: Path, to: str, data_name: str | None) -> "Int8Report":
    """Write the network of the run ``source``, or ``network``, in int8; calibrate and evaluate it on its data.

    Raises:
        ConfigError: an option does not fit, or the network is a detector.
        DataError: the data are missing, or have other classes than the network.
    """
    from ecanet import deploy, training
    from ecanet.data import ClassificationData, check_classes

    task = training.restore(None if network else source, model=network, data_name=data_name)
    if not task.recipe.data.name:
        raise ConfigError(f"{source} does not say what it was trained on: give the data set with --images")
    images = training.build_data(task.recipe, split=task.split)
    if not isinstance(images, ClassificationData):
        raise ConfigError(f"{source} is a detector, and int8 is for classifiers; leave --int8 out")
    check_classes(task.recipe.data.name, images.spec, task.spec)
    images.spec, takes = task.spec, training.describe_images(task)
    calibration, _ = training.sample_images(images, CALIBRATION, train=True)
    held_out, labels = training.sample_images(images, HELD_OUT, train=False)
    return deploy.quantize(
        task.model,
        path,
        target=to,
        calibration=calibration.expand(-1, takes.channels, -1, -1),
        held_out=(held_out.expand(-1, takes.channels, -1, -1), labels),
        classes=task.spec.class_names,
        preprocessing=takes,
    )


def load(
    source: str, attention: str | None, kernel_sizes: str | None, weights: str | None
) -> "tuple[nn.Module, tuple[str, ...], Preprocessing]":
    """Return the network that ``source`` means, the names of its classes, and what it expects of images.

    Raises:
        ConfigError: ``source`` is no file and names no network, or an option does not fit.
        CheckpointError: the weights cannot be read or do not fit.
    """
    from ecanet import networks, training

    library, _ = networks.find_library(source)
    is_run = Path(source).exists() and library != "file"
    if not (is_run or library) and Path(source).name != source:  # this library's names have no slash
        raise ConfigError(f"no run or checkpoint at {source}; a network is named NAME, timm:NAME or torchvision:NAME")
    if is_run:
        if attention or kernel_sizes or weights:
            raise ConfigError("--attention, --kernel-sizes and --weights are for a network's name; a run holds its own")
        task = training.restore(source)
    elif weights not in (None, "none"):
        task = training.restore(model=model_config(name_network(source), attention, kernel_sizes, weights))
    else:
        model = build(source, attention, kernel_sizes)
        print(f"{source} has random weights; --weights default takes its library's own", file=sys.stderr)
        return model, (), networks.find_preprocessing(source)
    return task.model.eval(), task.spec.class_names, training.describe_images(task)


def build(name: str, attention: str | None, kernel_sizes: str | None) -> "nn.Module":
    """Return the network ``name`` with random weights; other libraries' get gates where ``attention`` names one."""
    from ecanet import networks
    from ecanet.recipes import parse_kernel_sizes
    from ecanet.studies import cost

    options: dict[str, object] = {} if kernel_sizes is None else {"kernel_sizes": parse_kernel_sizes(kernel_sizes)}
    name = name_network(name)
    if networks.is_ours(name):
        return networks.find(name, **({"attention": attention} if attention else {}), **options).eval()
    if attention in (None, "none"):
        return networks.find(name, **options).eval()
    return cost.attach_by_name(name, attention, **options).eval()


def check_is_other(path: Path, source: str) -> None:
    """Raise ConfigError if ``path`` is the checkpoint ``source``, which the file would replace."""
    if path.is_file() and Path(source).is_file() and path.samefile(source):
        raise ConfigError(f"{path} is the checkpoint itself; give another name by --out")


def name_file(source: str, ending: str) -> Path:
    """Return the place of the file: in the run's directory, else here under the network's name.

    >>> name_file("timm:resnet18", ".onnx").name
    'resnet18.onnx'
    """
    path = Path(source)
    if path.is_dir():
        return path / f"model{ending}"
    if path.is_file() and ":" not in source:
        return path.with_name(path.stem + ending)
    return Path(source.rpartition(":")[2] + ending)
