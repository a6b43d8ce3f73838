"""The command `ecanet bench`."""

from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import console
from ecanet.errors import ConfigError

__all__ = ["app"]

app = typer.Typer()


@app.command()
def bench(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One batch size, fewer rounds: about four minutes.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compiled networks too.", show_default="unless --quick"),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="One or more: 1,8,32.", show_default="8 or 256 with --quick; 1,8,32 or 1,32,256"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The result, JSON; a plot goes beside it.")] = Path("bench.json"),
) -> None:
    """Time ECA-ResNet-50 beside plain and SE, timm's and torchvision's, taking turns, once all are checked."""
    from ecanet.studies import bench

    sizes = None if batch_size is None else parsed_sizes(batch_size)
    bench.check_out(out)
    result = bench.run(device=device, quick=quick, compiled=compiled, batch_sizes=sizes, say=console.print)
    picture = bench.write(result, out)
    bench.show(result, console)
    if result["compile_seconds"]:
        console.print(f"compiling took {sum(result['compile_seconds'].values()):.0f} s")
    console.print(f"took {result['seconds']:.0f} s; result {out}, plot {picture}")


def parsed_sizes(text: str) -> list[int]:
    """The numbers of ``1,8,32``.

    Raises:
        ConfigError: one is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch-size must be one or more numbers such as 1,8,32, got {text!r}") from None
