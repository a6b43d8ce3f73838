"""Show and write the benchmark's result: tables on a terminal, a JSON file, and a plot beside it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rich import box
from rich.console import Console
from rich.table import Table

from ecanet.errors import ConfigError
from ecanet.report import figures, write_file
from ecanet.studies.bench.measure import compute_ratio
from ecanet.studies.bench.rows import LayerRow, NetworkRow, Result

__all__ = ["check_out", "plot", "show", "write"]

Row = TypeVar("Row", bound=Mapping[str, object])

BASES = ("torchvision plain", "plain")
"""The network by whose time the tables divide the others' times: the first of these that was timed.

Further ratios are printed below the tables.
"""

COLOURS = {"ecanet eca": "#0b5cad", "optimized eca": "#0b5cad", "timm eca": "#e08a1e", "timm se": "#b9a7cf"}
TAILS = {"tail reference": "#c4cbd3", "tail timm": "#e08a1e", "tail ecanet": "#0b5cad", "tail fused": "#46a35a"}
PLAIN = "#9aa4ae"


def check_out(out: Path) -> None:
    """Check before a long run that its result can be written to ``out``, and a plot beside it.

    Raises:
        ConfigError: ``out`` does not end in .json, is a folder, or is in a folder that cannot be written to.
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


def write(result: Result, out: Path) -> Path:
    """Write the result as JSON to ``out`` and its plot beside it; return the plot's path.

    Each file is written completely or not at all.
    """
    write_file(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    picture = out.with_suffix(".png")
    write_file(picture, plot(result))
    return picture


# tables


def show(result: Result, console: Console) -> None:
    """Print the tables: networks by batch size and phase, then the block tails."""
    console.print(
        f"{format_headline(result)}. Times are medians over the rounds; ratios are of times in the same round, "
        "± half the distance of their quartiles."
    )
    for size in list_batch_sizes(result):
        for phase in ("training", "inference"):
            rows = select_rows(result["networks"], batch_size=size, phase=phase)
            console.print(make_networks_table(rows, f"{phase}, batch {size}"))
            for r in select_rows(result["ratios"], batch_size=size, phase=phase):
                quartiles = f"{r['low']:.3f} to {r['high']:.3f}"
                console.print(f"  {r['first']} / {r['second']}: {r['median']:.3f} ({quartiles}) of the time")
        if not result["layers"]:  # any network's blocks are not known alone
            continue
        copied = select_rows(result["copy"], batch_size=size)[0]["gb_per_second"]["median"]
        title = f"block tail, forward and backward, batch {size} (a copy moves {copied:.1f} GB/s)"
        console.print(make_layers_table(select_rows(result["layers"], batch_size=size), title))


def format_headline(result: Result) -> str:
    """Return the network, the settings and the machine in one line."""
    found = result["environment"]
    return (
        f"{found['model']}, {found['image_size']} pixels, {found['dtype']}; {found['device']}, "
        f"{found['threads']} thread{'s' * (cast(int, found['threads']) > 1)}, torch {found['torch']}"
    )


def make_networks_table(rows: Sequence[NetworkRow], title: str) -> Table:
    """Return a table with one row for each network: time, rate, ratio to the plain one, memory, bytes."""
    base = next(row for name in BASES for row in rows if row["variant"] == name)
    table = make_table(title, "network", "ms", "images/s", "/ plain", "MB held", "MB moved/image")
    for row in rows:
        held, moved = row.get("memory_mb"), row["moved_mb_per_image"]
        table.add_row(
            row["variant"],
            format_three_digits(row["ms"]["median"]),
            format_three_digits(row["images_per_second"]),
            format_ratio(row, base),
            "" if held is None else f"{held:.0f}",
            "" if moved is None else f"{moved:.0f}",
        )
    return table


def make_layers_table(rows: Sequence[LayerRow], title: str) -> Table:
    """Return a table with one row for each shape and variant.

    Its columns are the time, the MB moved (counted, not measured), the bandwidth relative to that of a large copy, and
    the time relative to the plain variant and to timm's.
    """
    table = make_table(title, "shape", "variant", "ms", "MB moved", "of copy", "/ plain", "/ timm")
    for at, row in enumerate(rows):
        part = row["variant"].split()[0]
        peers = [select_rows(rows, shape=row["shape"], variant=f"{part} {peer}") for peer in ("plain", "timm")]
        is_new = at == 0 or row["shape"] != rows[at - 1]["shape"]
        table.add_row(
            "x".join(map(str, row["shape"][1:])) if is_new else "",
            row["variant"],
            format_three_digits(row["ms"]["median"]),
            format_three_digits(row["moved_mb"]),
            f"{row['share_of_copy']:.0%}",
            *(format_ratio(row, peer[0]) if peer else "" for peer in peers),
        )
    return table


def make_table(title: str, *columns: str) -> Table:
    """Return an empty table without vertical lines: names are left-aligned, numbers right-aligned."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        left = column in ("network", "shape", "variant")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def select_rows(rows: Sequence[Row], **values: object) -> list[Row]:
    """Return the rows that have these ``values``."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def list_batch_sizes(result: Result) -> list[int]:
    """Return the batch sizes in the order in which they were timed."""
    return list(dict.fromkeys(row["batch_size"] for row in result["networks"]))


def format_ratio(row: NetworkRow | LayerRow, base: NetworkRow | LayerRow) -> str:
    """Return "1.05 ±0.02": the median of the time ratio, ± half the quartiles' distance; "" for ``base``."""
    if row is base:
        return ""
    r = compute_ratio(row["seconds"], base["seconds"])
    return f"{r['median']:.2f} ±{(r['high'] - r['low']) / 2:.2f}"


def format_three_digits(x: float) -> str:
    """Return ``x`` with three digits, or more if it is 1000 or larger.

    >>> format_three_digits(1234.5), format_three_digits(12.345), format_three_digits(0.5)
    ('1234', '12.3', '0.50')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


# plot


def plot(result: Result) -> bytes:
    """Return a PNG: images per second in training and inference, and block tails if timed; one row a batch size."""
    from matplotlib.figure import Figure

    sizes = list_batch_sizes(result)
    most = max(len(select_rows(result["networks"], batch_size=sizes[0], phase=p)) for p in ("training", "inference"))
    columns = 3 if result["layers"] else 2
    figure: Any = Figure(figsize=(14, len(sizes) * (1.6 + 0.34 * most)), layout="constrained")
    grid = figure.subplots(len(sizes), columns, squeeze=False)
    for size, (training, inference, *layers) in zip(sizes, grid, strict=True):
        for axes, phase in ((training, "training"), (inference, "inference")):
            rows = select_rows(result["networks"], batch_size=size, phase=phase)
            _draw_networks(axes, rows, f"{phase}, batch {size}")
        for axes in layers:
            _draw_layers(axes, select_rows(result["layers"], batch_size=size), f"block tail, batch {size}")
    figure.suptitle(f"{format_headline(result)}. Bars are medians, lines quartiles.")
    return figures.to_png(figure)


def _draw_networks(axes: Any, rows: Sequence[NetworkRow], title: str) -> None:
    """Draw images per second, one bar for each network: ECA in colour, compiled networks hatched."""
    for at, row in enumerate(rows):
        size, ms, rate = row["batch_size"], row["ms"], row["images_per_second"]
        name = row["variant"].removesuffix(" compiled")
        hatch = "//" if name != row["variant"] else None
        whiskers = [[rate - 1e3 * size / ms["high"]], [1e3 * size / ms["low"] - rate]]
        plain = name.split()[-1] == "plain"
        colour = COLOURS.get(name, PLAIN if plain else COLOURS["ecanet eca"])
        axes.barh(at, rate, color=colour, hatch=hatch, edgecolor="white", xerr=whiskers, capsize=2)
        axes.text(0, at, f" {format_three_digits(rate)}", va="center", color="white", fontweight="bold")
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="images per second (longer is faster)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(axes: Any, rows: Sequence[LayerRow], title: str) -> None:
    """Draw time as a multiple of the tail without attention, bars grouped by shape."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    names = [name for name in TAILS if select_rows(rows, variant=name)]
    for at, name in enumerate(names):
        multiples = [
            compute_ratio(
                *(select_rows(rows, shape=list(shape), variant=v)[0]["seconds"] for v in (name, "tail plain"))
            )
            for shape in shapes
        ]
        positions = [i + 0.8 * ((at + 0.5) / len(names) - 0.5) for i in range(len(shapes))]
        medians = [m["median"] for m in multiples]
        whiskers = [[m["median"] - m["low"] for m in multiples], [m["high"] - m["median"] for m in multiples]]
        label = name.removeprefix("tail ")
        axes.bar(positions, medians, 0.8 / len(names), yerr=whiskers, color=TAILS[name], label=label, capsize=2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(shapes)), [f"{c}\n{h}×{w}" for _, c, h, w in shapes])
    axes.set(title=title, ylabel="time / without attention (lower is faster)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
