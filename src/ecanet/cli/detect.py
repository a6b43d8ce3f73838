"""The command `ecanet detect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    OnCorrupt,
    check_folder,
    check_on_corrupt,
    skipped,
)
from ecanet.errors import ConfigError, DataError

__all__ = ["app"]

app = typer.Typer()


@app.command()
def detect(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their JSON.")] = Path("detections"),
    threshold: Annotated[float, typer.Option(help="Lowest score to show, from 0 to 1.")] = 0.5,
    on_corrupt: OnCorrupt = "error",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw boxes and masks onto pictures, with JSON beside."""
    check_on_corrupt(on_corrupt)
    check_folder(out)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold must be from 0 to 1, got {threshold:g}")
    from ecanet import networks, training

    found_device = networks.find_device(device)
    # what was drawn before, in a folder inside that of the images, is not looked at again
    files = [
        f for path in images for f in training.image_files(path) if not (Path(path).is_dir() and _inside(f, out, path))
    ]
    if not files:
        raise DataError(f"there are no images but those in --out {out}; give their folder itself, and another --out")
    found = []
    for answer in training.detect(training.restore(checkpoint), files, out, threshold=threshold, device=found_device):
        if isinstance(answer, DataError):
            skipped(answer, on_corrupt)
            continue
        found.append(answer)
        if not as_json:
            names = ", ".join(f"{o['name']} {o['score']:.2f}" for o in answer["objects"])
            print(f"{answer['path']}: {names or 'nothing'} -> {answer['picture']}")
    if as_json:
        print(json.dumps(found, indent=2))


def _inside(file: Path, out: Path, folder: str) -> bool:
    """Whether ``file`` lies in ``out``, and ``out`` inside ``folder``."""
    whole, place = Path(folder).resolve(), out.resolve()
    return place != whole and place.is_relative_to(whole) and file.resolve().is_relative_to(place)
