"""The command `ecanet detect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli_options import AsJson, Checkpoint
from ecanet.errors import ConfigError

__all__ = ["app"]

app = typer.Typer()


@app.command()
def detect(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their JSON.")] = Path("detections"),
    threshold: Annotated[float, typer.Option(help="Lowest score to show, from 0 to 1.")] = 0.5,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw boxes and masks onto pictures, with JSON beside."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold must be from 0 to 1, got {threshold:g}")
    from ecanet import detect, trained

    files = [file for path in images for file in trained.image_files(path)]
    answers = detect.detect(trained.restore(checkpoint), files, out, threshold=threshold, device=device)
    if as_json:
        print(json.dumps(answers, indent=2))
        return
    for answer in answers:
        names = ", ".join(f"{o['name']} {o['score']:.2f}" for o in answer["objects"])
        print(f"{answer['path']}: {names or 'nothing'} -> {answer['picture']}")
