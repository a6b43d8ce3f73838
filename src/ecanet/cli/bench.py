"""The command `ecanet bench`."""

from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import AsJson, ModelName, Quiet, console, name_network, notices, print_json, split
from ecanet.errors import ConfigError


def bench(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One batch size: minutes.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Also compiled; not if quick.", show_default=False),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Comma-separated; by device.", show_default=False),
    ] = None,
    model: ModelName = None,
    attention: Annotated[str | None, typer.Option(help="Comma-separated attentions (eca).", show_default=False)] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width in pixels.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="JSON file, with a page next to it.")] = Path("bench.json"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time ECA-ResNet-50 and its peers, or a --model with gates.

    Checks every network first. Then they take turns.
    """
    from ecanet.studies import bench

    sizes = None if batch_size is None else parse_batch_sizes(batch_size)
    bench.check_out(out)
    say = notices.print if as_json else console.print
    if model is None:
        if attention or image_size is not None:
            raise ConfigError("--attention and --image-size need --model; without it ResNet-50 with ECA is timed")
        result = bench.run(device=device, quick=quick, compiled=compiled, batch_sizes=sizes, say=say)
    else:
        result = bench.run_model(
            name_network(model),
            split(attention) or ("eca",),
            device=device,
            quick=quick,
            compiled=compiled,
            batch_sizes=sizes,
            image_size=image_size,
            say=say,
        )
    page = bench.write(result, out)
    if as_json:
        print_json(result)
        return
    bench.show(result, console)
    if result["compile_seconds"]:
        console.print(f"compiling took {sum(result['compile_seconds'].values()):.0f} s")
    console.print(f"took {result['seconds']:.0f} s; result {out}, page {page}")


def parse_batch_sizes(text: str) -> list[int]:
    """Return the numbers in ``text``.

    >>> parse_batch_sizes("1,8,32")
    [1, 8, 32]

    Raises:
        ConfigError: one is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch-size must be one or more numbers such as 1,8,32, got {text!r}") from None
