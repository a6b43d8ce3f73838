"""The commands about shards: pack, index, check."""

from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import AsJson, Quiet, ValShare, console, print_json
from ecanet.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Pack photographs into tar files for large data.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Photographs, one folder for each class.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the shards.", show_default=False)],
    size: Annotated[
        int | None, typer.Option(min=1, help="Short side of larger images, in pixels.", show_default="as they are")
    ] = None,
    val_share: ValShare = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides order and split.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores")] = None,
    on_corrupt: Annotated[str, typer.Option(help="error, or skip unreadable images.")] = "error",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Pack a folder; train on it with `ecanet train shards:OUT`.

    Given again after a stop, the same command goes on.
    """
    from ecanet.shards import pack

    print_lines(
        pack(folder, out, size=size, val_share=val_share, seed=seed, workers=workers, on_corrupt=on_corrupt), as_json
    )


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Holds *.tar in WebDataset's layout.", show_default=False)],
    classes: Annotated[
        Path | None, typer.Option(help="File of class names, one a line.", show_default="0, 1, …")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Index tar files of others, so that training can read them.

    train, val or test in a file's name says what it holds.
    """
    from ecanet.shards import index

    try:
        names = None if classes is None else classes.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{classes}: class names cannot be read ({error}); give a text file, one name a line"
        ) from None
    print_lines(index(folder, class_names=names), as_json)


@app.command()
def check(
    address: Annotated[str, typer.Argument(help="Folder, or an address such as s3://bucket/set.", show_default=False)],
    images: Annotated[bool, typer.Option("--images", help="Decode every image, too.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read a set from end to end: checksums, images and labels."""
    from ecanet.shards import check

    print_lines(check(address, images=images), as_json)


def print_lines(lines: list[str], as_json: bool) -> None:
    """Print ``lines``, which say what was found or written, or print them as JSON."""
    if as_json:
        print_json(lines)
        return
    for line in lines:
        console.print(line, soft_wrap=True)
