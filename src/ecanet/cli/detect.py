"""The command `ecanet detect`."""

from pathlib import Path
from typing import Annotated

import typer

from ecanet import progress
from ecanet.cli.options import (
    AsJson,
    Attention,
    Device,
    KernelSizes,
    ModelName,
    OnCorrupt,
    Quiet,
    Weights,
    check_folder,
    check_on_corrupt,
    model_config,
    print_json,
    report_unreadable,
)
from ecanet.errors import ConfigError, DataError


def detect(
    paths: Annotated[list[str], typer.Argument(help="A run, and images or folders.", metavar="[RUN] IMAGES...")],
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("detections"),
    threshold: Annotated[float, typer.Option(help="Lowest score to show (0 to 1).")] = 0.5,
    on_corrupt: OnCorrupt = "error",
    model: ModelName = None,
    weights: Weights = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Detect objects: draw boxes and masks on images, write JSON.

    Without a run: --model torchvision:fasterrcnn_resnet50_fpn_v2
    --weights default knows COCO's classes.
    """
    check_on_corrupt(on_corrupt)
    check_folder(out)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold must be from 0 to 1, got {threshold:g}")
    from ecanet import networks, training

    checkpoint, *images = (None, *paths) if weights else paths
    if not images:
        raise ConfigError("no images: give a run and images, or --model, --weights and images")
    config = model_config(model, attention, kernel_sizes, weights)
    found_device = networks.find_device(device)
    # If --out is inside a directory of images, it may hold pictures that an earlier call drew: those are no input.
    files = [
        file
        for path in images
        for file in training.image_files(path)
        if not (Path(path).is_dir() and _is_output(file, out, path))
    ]
    if not files:
        raise DataError(
            f"the only images are those in --out {out}; name that directory itself and choose another --out"
        )
    found: list[training.ImageDetections] = []
    task = training.restore(checkpoint, model=config)
    answers = training.detect(task, files, out, threshold=threshold, device=found_device)
    for answer in progress.track(answers, "images", len(files)):
        if isinstance(answer, DataError):
            report_unreadable(answer, on_corrupt)
            continue
        found.append(answer)
        if not as_json:
            names = ", ".join(f"{o['name']} {o['score']:.2f}" for o in answer["objects"])
            print(f"{answer['path']}: {names or 'nothing'} -> {answer['picture']}")
    if as_json:
        print_json(found)


def _is_output(file: Path, out: Path, folder: str) -> bool:
    """Return whether ``file`` lies in ``out``, and ``out`` is below ``folder`` and not ``folder`` itself."""
    whole, output = Path(folder).resolve(), out.resolve()
    return output != whole and output.is_relative_to(whole) and file.resolve().is_relative_to(output)
