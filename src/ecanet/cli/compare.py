"""The commands that count, compare and look inside: cost, paper, ablate, inspect."""

import json
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
    Epochs,
    KernelSizes,
    ModelName,
    Settings,
    changed,
    check_folder,
    console,
    model_config,
    parsed,
)
from ecanet.recipes import parse_kernel_sizes

__all__ = ["app"]

app = typer.Typer()


@app.command()
def cost(
    names: Annotated[list[str], typer.Argument(metavar="MODEL…", help="NAME, torchvision:NAME or timm:NAME.")],
    attention: Annotated[list[str] | None, typer.Option(help="none, eca, se, …; may be repeated.")] = None,
    kernel_sizes: KernelSizes = None,
    side: Annotated[int | None, typer.Option(help="Image size; by default what the network is made for.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the attention: --set reduction=8.", metavar="KEY=VALUE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-accumulates and bytes of networks, in today's units and in the paper's."""
    from ecanet.studies import cost

    options = parsed(settings or [])
    if kernel_sizes:
        options["kernel_sizes"] = parse_kernel_sizes(kernel_sizes)
    rows = cost.make_table(names, attentions=attention, side=side, **options)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "parameters", "attention", "MACs", "MB", "paper's units")
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(
            f"{row['model']} {row['attention']}",
            f"{row['parameters']:,}",
            f"{row['attention parameters']:,}",
            f"{row['MACs'] / 1e9:.3f} G",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['paper #Param']} / {row['paper FLOPs']}",
        )
    console.print(table)
    console.print(cost.WHY)


@app.command()
def paper(
    table: Annotated[str | None, typer.Argument(help="1 to 6, poster or figure4.", show_default="all")] = None,
    measure: Annotated[str, typer.Option(help="Of params, flops, speed, accuracy.")] = "params,flops",
    data: Annotated[Path | None, typer.Option(help="ImageNet's folder, for accuracy.", show_default=False)] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of checkpoints, one a row.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Write Markdown, JSON and pictures here.")] = None,
    device: Annotated[str, typer.Option(help="Where speed is measured: auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """The paper's tables, its numbers beside what is measured here: `ecanet paper 3`."""
    from ecanet.studies import paper

    check_folder(out)
    tables = paper.run(table, measure=measure.split(","), data=data, weights=weights, device=device)
    print(paper.to_json(tables) if as_json else paper.to_markdown(tables), end="")
    if out is not None:
        paper.write(tables, out)


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="Recipe or data, as for train.")] = "quickstart",
    variants: Annotated[str | None, typer.Option(help="Of them, by commas.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 5,
    model: ModelName = None,
    epochs: Epochs = None,
    data_dir: DataDir = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder; cells finished in it are not run again.")] = Path("ablation"),
    on: Annotated[str, typer.Option(help="here or ray.")] = "here",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one cell.", show_default=False)] = None,
) -> None:
    """Compare attentions fairly: variants x seeds x one recipe, with intervals. Killed, it goes on where it was."""
    from ecanet.studies import ablate

    check_folder(out)
    changes = {"model.name": model, "epochs": epochs, "data.root": data_dir}
    changes = {key: value for key, value in changes.items() if value is not None} | parsed(settings or [])
    recipe = changed(recipes.find(name), changes)
    chosen = variants.split(",") if variants else tuple(ablate.VARIANTS)
    result = ablate.run(
        recipe, folder=out, variants=chosen, seeds=seeds, on=on, threads=threads, say=lambda line: console.print(line)
    )
    ablate.write(result)
    print(ablate.to_markdown(result))
    console.print(f"page {out / 'ablation.html'}")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    data: DataName = None,
    data_dir: DataDir = None,
    classes: Annotated[str | None, typer.Option(help="To draw, by commas.", show_default="the first four")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file to explain.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page, the pictures and the numbers.")] = Path("inspect"),
) -> None:
    """What the gates do: weights by layer and class, alarms, learned kernels; with --image, what they did to one."""
    from ecanet.studies import gates

    check_folder(out)
    found = gates.run(
        checkpoint,
        out,
        model=model_config(model, attention, kernel_sizes),
        data_name=data,
        data_dir=data_dir,
        classes=classes.split(",") if classes else (),
        image=image,
    )
    table = Table("gate", "channels", "mean", "spread: classes", "images", "saturated", "dead")
    for one in found.records:
        numbers = (float(one.mean.mean()), one.spread, float(one.deviation.mean()))
        shares = (f"{one.saturated:.1%}", str(int(one.dead.sum())))
        table.add_row(one.name, str(one.channels), *(f"{number:.3f}" for number in numbers), *shares)
    console.print(table)
    for one in found.records:
        for alarm in one.find_alarms():
            console.print(f"alarm: {one.name}: {alarm}")
    if found.answer:
        console.print(found.answer)
    console.print(f"page {out / 'inspect.html'}")
