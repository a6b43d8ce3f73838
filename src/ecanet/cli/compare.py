"""The commands that count, compare and inspect: cost, paper, ablate, inspect."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ecanet.cli.options import (
    AsJson,
    Attention,
    Checkpoint,
    DataDir,
    DataName,
    Device,
    Epochs,
    KernelSizes,
    ModelName,
    Quiet,
    Settings,
    Weights,
    check_folder,
    choose_recipe,
    collect_changes,
    console,
    keep_names,
    model_changes,
    model_config,
    name_network,
    notices,
    parse_settings,
    print_json,
    split,
)
from ecanet.recipes import parse_kernel_sizes


def cost(
    models: Annotated[list[str], typer.Argument(help="NAME, timm:NAME or torchvision:NAME.")],
    attention: Annotated[str | None, typer.Option(help="Comma-separated attentions.", show_default="none,eca")] = None,
    kernel_sizes: KernelSizes = None,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width in pixels.", show_default="the network's own")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Attention option: reduction=8.", metavar="KEY=VALUE", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, multiply-accumulates and bytes.

    Counts are printed in today's units and in the paper's.
    """
    from ecanet.studies import cost

    options = parse_settings(settings or ())
    if kernel_sizes:
        options["kernel_sizes"] = parse_kernel_sizes(kernel_sizes)
    rows = cost.make_table(
        [name_network(name) for name in models], attentions=split(attention) or None, side=image_size, **options
    )
    if as_json:
        print_json(rows)
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


def paper(
    table: Annotated[str | None, typer.Argument(help="1 to 6, poster, figure4 or later.", show_default="all")] = None,
    measure: Annotated[str, typer.Option(help="Comma-separated: params, flops, speed, accuracy.")] = "params,flops",
    data_dir: Annotated[
        Path | None, typer.Option(help="ImageNet or COCO directory (accuracy).", show_default=False)
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Directory of checkpoints (accuracy).", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write Markdown, JSON and plots here.", show_default=False)] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show the paper's tables next to measured values."""
    from ecanet.studies import paper

    check_folder(out)
    tables = paper.run(table, measure=split(measure), data=data_dir, weights=weights, device=device)
    print(paper.to_json(tables) if as_json else paper.to_markdown(tables), end="")
    if out is not None:
        paper.write(tables, out)


def ablate(
    recipe: Annotated[str, typer.Argument(help="Recipe or data set, as for train.")] = "quickstart",
    variants: Annotated[str | None, typer.Option(help="Comma-separated variants.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(help="Runs per variant.")] = 5,
    model: ModelName = None,
    weights: Weights = None,
    epochs: Epochs = None,
    data_dir: DataDir = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("ablation"),
    on: Annotated[str, typer.Option(help="Run here or on ray.")] = "here",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per run.", show_default=False)] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare attention modules fairly, over several seeds.

    Trains every variant with every seed by one recipe; prints 95 % intervals.
    Run again after an interruption: finished runs in --out are kept.
    """
    from ecanet.studies import ablate

    check_folder(out)
    changes = model_changes(model=model, attention=None, weights=weights)
    changes |= collect_changes({"epochs": epochs, "data.root": data_dir}, settings)
    result = ablate.run(
        choose_recipe(recipe, changes),
        folder=out,
        variants=split(variants) or tuple(ablate.VARIANTS),
        seeds=seeds,
        on=on,
        threads=threads,
        say=notices.print if as_json else console.print,
    )
    ablate.write(result)
    if as_json:
        print(ablate.to_json(result))
        return
    print(ablate.to_markdown(result))
    console.print(f"report {out / 'ablation.html'}")


def inspect(
    checkpoint: Checkpoint,
    model: ModelName = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    data: DataName = None,
    data_dir: DataDir = None,
    classes: Annotated[str | None, typer.Option(help="Comma-separated classes to plot.", show_default="four")] = None,
    image: Annotated[Path | None, typer.Option(help="Image file to explain.", show_default=False)] = None,
    cam: Annotated[bool, typer.Option("--cam", help="Class-activation maps, gates on and off.")] = False,
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("inspect"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what the gates of a trained network do.

    Writes weights by layer and class, warnings and learned kernels. With --image: what each gate did to that image.
    """
    from ecanet.studies import gates

    check_folder(out)
    inspection = gates.run(
        checkpoint,
        out,
        model=model_config(model, attention, kernel_sizes),
        data_name=data,
        data_dir=data_dir,
        classes=split(classes),
        image=image,
        cam=cam,
    )
    if as_json:
        print(gates.to_json(inspection))
        return
    columns, rows = gates.list_rows(inspection)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    keep_names(table)
    console.print(table)
    for gate in inspection.records:
        for alarm in gate.find_alarms():
            console.print(f"alarm: {gate.name}: {alarm}")
    if inspection.answer:
        console.print(inspection.answer)
    console.print(f"report {out / 'inspect.html'}")
