"""What the benchmark found: tables on a terminal, a JSON file, and a plot beside it."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ecanet.errors import ConfigError
from ecanet.report import figures, write_file
from ecanet.studies.bench.measure import ratio

__all__ = ["check_out", "plot", "show", "write"]

BASE = "torchvision plain"
"""The plain network that the others' times are divided by in the tables; further ratios follow below them."""

COLOURS = {"ecanet eca": "#0b5cad", "optimized eca": "#0b5cad", "timm eca": "#e08a1e", "timm se": "#b9a7cf"}
TAILS = {"tail reference": "#c4cbd3", "tail timm": "#e08a1e", "tail ecanet": "#0b5cad", "tail fused": "#46a35a"}
PLAIN = "#9aa4ae"


def check_out(out: Path) -> None:
    """Before a long run, see that its result can be written to ``out``, and a plot beside it.

    Raises:
        ConfigError: ``out`` does not end in .json, is a folder, or lies where nothing can be written.
    """
    if out.suffix != ".json":
        raise ConfigError(f"the result is JSON, and the plot goes beside it: --out must end in .json, got {out}")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; --out is a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        why = "it is a file" if out.parent.is_file() else error.strerror
        raise ConfigError(f"cannot write to {out.parent} ({why}); choose another --out") from None


def write(result: dict[str, Any], out: Path) -> Path:
    """Write the result as JSON to ``out`` and its plot beside it, each whole or not at all; gives the plot's path."""
    write_file(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    picture = out.with_suffix(".png")
    write_file(picture, plot(result))
    return picture


# tables


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables: networks by batch size and phase, then the ends of the blocks."""
    console.print(
        f"{headline(result)}. Times are medians over the rounds; ratios are of times in the same round, "
        "± half the distance of their quartiles."
    )
    for size in sizes_of(result):
        for phase in ("training", "inference"):
            rows = chosen(result["networks"], batch_size=size, phase=phase)
            console.print(networks_table(rows, f"{phase}, batch {size}"))
            for r in chosen(result["ratios"], batch_size=size, phase=phase):
                quartiles = f"{r['low']:.3f} to {r['high']:.3f}"
                console.print(f"  {r['first']} / {r['second']}: {r['median']:.3f} ({quartiles}) of the time")
        copied = chosen(result["copy"], batch_size=size)[0]["gb_per_second"]["median"]
        title = f"end of one block, forward and backward, batch {size} (a copy moves {copied:.1f} GB/s)"
        console.print(layers_table(chosen(result["layers"], batch_size=size), title))


def headline(result: dict[str, Any]) -> str:
    """What ran where."""
    place = result["environment"]
    return (
        f"{place['model']}, {place['image_size']} pixels, {place['dtype']}; {place['device']}, "
        f"{place['threads']} thread{'s' * (place['threads'] > 1)}, torch {place['torch']}"
    )


def networks_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """One row a network: time, rate, time as a share of the plain one's, memory, bytes."""
    table = narrow(title, "network", "ms", "images/s", "/ plain", "MB held", "MB moved/image")
    for row in rows:
        held, moved = row.get("memory_mb"), row.get("moved_mb_per_image")
        table.add_row(
            row["variant"],
            three_digits(row["ms"]["median"]),
            three_digits(row["images_per_second"]),
            ratio_to(row, chosen(rows, variant=BASE)[0]),
            "" if held is None else f"{held:.0f}",
            "" if moved is None else f"{moved:.0f}",
        )
    return table


def layers_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """One row a shape and variant: time, bytes by count, their share of the copy's bandwidth, ratios."""
    table = narrow(title, "shape", "what", "ms", "MB moved", "of copy", "/ plain", "/ timm")
    for at, row in enumerate(rows):
        kind = row["variant"].split()[0]
        peers = [chosen(rows, shape=row["shape"], variant=f"{kind} {peer}") for peer in ("plain", "timm")]
        new = at == 0 or row["shape"] != rows[at - 1]["shape"]
        table.add_row(
            "x".join(map(str, row["shape"][1:])) if new else "",
            row["variant"],
            three_digits(row["ms"]["median"]),
            three_digits(row["moved_mb"]),
            f"{row['share_of_copy']:.0%}",
            *(ratio_to(row, peer[0]) if peer else "" for peer in peers),
        )
    return table


def narrow(title: str, *columns: str) -> Table:
    """A table without lines between columns, names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        left = column in ("network", "shape", "what")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def chosen(rows: Sequence[dict[str, Any]], **what: Any) -> list[dict[str, Any]]:
    """The rows that say ``what``."""
    return [row for row in rows if all(row.get(key) == value for key, value in what.items())]


def sizes_of(result: dict[str, Any]) -> list[int]:
    """The batch sizes, in order."""
    return list(dict.fromkeys(row["batch_size"] for row in result["networks"]))


def ratio_to(row: dict[str, Any], base: dict[str, Any]) -> str:
    """Time of ``row`` over that of ``base`` with its spread; empty where they are one."""
    if row is base:
        return ""
    r = ratio(row["seconds"], base["seconds"])
    return f"{r['median']:.2f} ±{(r['high'] - r['low']) / 2:.2f}"


def three_digits(x: float) -> str:
    """
    >>> three_digits(1234.5), three_digits(12.345), three_digits(0.5)
    ('1234', '12.3', '0.50')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


# plot


def plot(result: dict[str, Any]) -> bytes:
    """A PNG: images per second in training and inference, and the ends of the blocks; one row a batch size."""
    from matplotlib.figure import Figure

    sizes = sizes_of(result)
    most = max(len(chosen(result["networks"], batch_size=sizes[0], phase=p)) for p in ("training", "inference"))
    figure = Figure(figsize=(14, len(sizes) * (1.6 + 0.34 * most)), layout="constrained")
    grid = figure.subplots(len(sizes), 3, squeeze=False)
    for size, (training, inference, layers) in zip(sizes, grid, strict=True):
        for axes, phase in ((training, "training"), (inference, "inference")):
            draw_networks(axes, chosen(result["networks"], batch_size=size, phase=phase), f"{phase}, batch {size}")
        draw_layers(layers, chosen(result["layers"], batch_size=size), f"end of a block, batch {size}")
    figure.suptitle(f"{headline(result)}. Bars are medians, lines quartiles.")
    return figures.to_png(figure)


def draw_networks(axes: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Images per second, a bar a network, ECA in colour, compiled ones hatched."""
    for at, row in enumerate(rows):
        size, ms, rate = row["batch_size"], row["ms"], row["images_per_second"]
        name = row["variant"].removesuffix(" compiled")
        hatch = "//" if name != row["variant"] else None
        whiskers = [[rate - 1e3 * size / ms["high"]], [1e3 * size / ms["low"] - rate]]
        axes.barh(at, rate, color=COLOURS.get(name, PLAIN), hatch=hatch, edgecolor="white", xerr=whiskers, capsize=2)
        axes.text(0, at, f" {three_digits(rate)}", va="center", color="white", fontweight="bold")
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="images per second (longer is faster)")
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(axes: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Time as a multiple of the end without attention, bars grouped by shape."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    names = [name for name in TAILS if chosen(rows, variant=name)]
    for at, name in enumerate(names):
        multiples = [
            ratio(*(chosen(rows, shape=list(shape), variant=v)[0]["seconds"] for v in (name, "tail plain")))
            for shape in shapes
        ]
        places = [i + 0.8 * ((at + 0.5) / len(names) - 0.5) for i in range(len(shapes))]
        middle = [m["median"] for m in multiples]
        whiskers = [[m["median"] - m["low"] for m in multiples], [m["high"] - m["median"] for m in multiples]]
        label = name.removeprefix("tail ")
        axes.bar(places, middle, 0.8 / len(names), yerr=whiskers, color=TAILS[name], label=label, capsize=2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(shapes)), [f"{c}\n{h}×{w}" for _, c, h, w in shapes])
    axes.set(title=title, ylabel="time / without attention (lower is faster)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
