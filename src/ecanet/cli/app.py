"""The command `ecanet app`."""

from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import Attention, Device, KernelSizes, ModelName, Weights, console, model_config
from ecanet.errors import ConfigError


def app(
    checkpoint: Annotated[str | None, typer.Argument(help="Run or checkpoint.", show_default=False)] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to offer.", show_default=False)] = None,
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    model: ModelName = None,
    weights: Weights = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    device: Device = "auto",
) -> None:
    """Try a network in the browser.

    Drop an image on the page: it shows classes, heat map and gates.
    Without a run: --model torchvision:mobilenet_v2 --weights default.
    """
    from ecanet import networks, training
    from ecanet.studies import app as page

    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535, got {port}")
    if checkpoint is None and weights is None:
        raise ConfigError("nothing to show: give a run, or --model and --weights")
    page.load_gradio()  # a missing package is said before weights are downloaded
    config = model_config(model, attention, kernel_sizes, weights)
    task = training.restore(checkpoint, model=config).to(networks.find_device(device))
    page.run(
        task,
        images=images,
        port=port,
        show=not no_browser,
        say=lambda address: console.print(f"{address} (Ctrl-C ends it)"),
    )
