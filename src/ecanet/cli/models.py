"""The command `ecanet models`."""

from dataclasses import asdict
from typing import Annotated, TypedDict

import typer
from rich.table import Table

from ecanet.cli.options import AsJson, Attention, KernelSizes, console, name_network, print_json
from ecanet.errors import ConfigError
from ecanet.recipes import parse_kernel_sizes


class Row(TypedDict):
    """One network with one attention module.

    ``attention`` is empty for another library's network as it is. ``parameters`` is None if the two do not fit, and
    ``note`` says why.
    """

    model: str
    attention: str
    parameters: int | None
    note: str


def models(
    name: Annotated[str | None, typer.Argument(help="NAME, timm:NAME or torchvision:NAME.", show_default=False)] = None,
    attention: Attention = None,
    kernel_sizes: KernelSizes = None,
    attach: Annotated[
        str | None,
        typer.Option(help="Show where attach puts this attention.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List networks and count their parameters.

    With a name: that network with every attention, or with --attention.
    With --attach: where attach puts gates in that network.
    """
    name = None if name is None else name_network(name)
    if attach is not None:
        if name is None or attention is not None:
            raise ConfigError("--attach takes one network and names the attention: ecanet models resnet50 --attach eca")
        show_attached(name, attach, kernel_sizes, as_json)
        return
    rows = count(name, attention, kernel_sizes)
    if as_json:
        print_json(rows)
        return
    table = Table("model", "attention", "parameters")
    table.columns[2].justify = "right"
    for row in rows:
        table.add_row(row["model"], row["attention"], "" if row["parameters"] is None else f"{row['parameters']:,}")
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['model']} with {row['attention']}: {row['note']}")


def count(name: str | None, attention: str | None, kernel_sizes: str | None) -> list[Row]:
    """Return one row for each network and attention: of all networks plain and with ECA, or of ``name`` with all.

    Another library's network is one row, since its attention is its own, and one more with ``attention`` attached.

    Raises:
        ConfigError: the network does not exist, or the attention or kernel sizes that were given do not fit it.
        AttachError: there is no place for gates.
    """
    from ecanet import list_attentions, list_models, networks

    options: dict[str, object] = {} if kernel_sizes is None else {"kernel_sizes": parse_kernel_sizes(kernel_sizes)}
    if name is not None and not networks.is_ours(name):
        if options and attention in (None, "none"):
            raise ConfigError("--kernel-sizes is about an attention: name it, such as --attention eca")
        found = [Row(model=name, attention="", parameters=count_parameters(name, {}), note="")]
        if attention not in (None, "none"):
            from ecanet.studies import cost

            parameters = sum(p.numel() for p in cost.attach_by_name(name, attention, **options).parameters())
            found.append(Row(model=name, attention=attention, parameters=parameters, note=""))
        return found
    rows: list[Row] = []
    attentions = [attention] if attention else list_attentions() if name else ["none", "eca"]
    for model in [name] if name else list_models():
        for one in attentions:
            try:
                rows.append(
                    Row(
                        model=model,
                        attention=one,
                        parameters=count_parameters(model, {"attention": one, **options}),
                        note="",
                    )
                )
            except ConfigError as error:
                # With all attentions of one network, one that does not fit must not hide the others.
                if attention or one in ("none", "eca"):
                    raise
                rows.append(Row(model=model, attention=one, parameters=None, note=str(error)))
    return rows


def count_parameters(name: str, options: dict[str, object]) -> int:
    """Return the number of parameters of the network ``name``, built on the meta device: it takes no memory."""
    import torch

    from ecanet import networks

    with torch.device("meta"):
        network = networks.find(name, **options)
    return sum(p.numel() for p in network.parameters())


def show_attached(name: str, attention: str, kernel_sizes: str | None, as_json: bool) -> None:
    """Print the sites at which `ecanet.attach` puts ``attention`` in the network ``name``."""
    from ecanet import attached
    from ecanet.studies import cost

    options = {} if kernel_sizes is None else {"kernel_sizes": parse_kernel_sizes(kernel_sizes)}
    model = cost.attach_by_name(name, attention, **options)
    sites = attached(model)
    parameters = sum(p.numel() for p in model.parameters()) - sum(site.parameters for site in sites)
    if as_json:
        print_json({"model": name, "parameters": parameters, "sites": [asdict(site) for site in sites]})
        return
    console.print(str(sites))
    console.print(f"{name}: {parameters:,} parameters, {sum(site.parameters for site in sites):,} added")
