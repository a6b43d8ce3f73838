"""Show and write the benchmark's result: tables on a terminal, a JSON file, and a plot and a page beside it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ecanet.errors import ConfigError
from ecanet.report import figures, make_table, page, write_file
from ecanet.studies.bench.figures import draw, draw_panels
from ecanet.studies.bench.measure import compute_ratio
from ecanet.studies.bench.rows import (
    LayerRow,
    NetworkRow,
    Result,
    format_headline,
    format_three_digits,
    list_batch_sizes,
    select_rows,
)

__all__ = ["check_out", "show", "write"]

BASES = ("torchvision plain", "plain")
"""The network by whose time the tables divide the others' times: the first of these that was timed.

Further ratios are printed below the tables.
"""

NAMES = ("network", "shape", "variant")
"""Columns of words; all others hold numbers."""

EXPLANATION = (
    "Times are medians over the rounds; ratios are of times in the same round, ± half the distance of their quartiles."
)


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
    """Write the result as JSON to ``out``, its plot (PNG) and its page (HTML) beside it; return the page's path.

    Each file is written completely or not at all.
    """
    write_file(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_file(out.with_suffix(".png"), figures.to_png(draw(result)))
    path = out.with_suffix(".html")
    write_file(path, to_html(result))
    return path


# tables


def show(result: Result, console: Console) -> None:
    """Print the tables: networks by batch size and phase, then the block tails."""
    console.print(f"{format_headline(result)}. {EXPLANATION}")
    for title, columns, rows, notes in list_tables(result):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in columns:
            table.add_column(column, justify="left" if column in NAMES else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            console.print(f"  {note}")


def to_html(result: Result) -> str:
    """Return one HTML page that needs no other file: the plots, then the tables."""
    environment = result["environment"]
    tables = [(title, "; ".join(notes), make_table(names, rows)) for title, names, rows, notes in list_tables(result)]
    return page(
        title=f"Speed of {environment['model']}",
        subtitle=f"{format_headline(result)}. {EXPLANATION}",
        tiles=[(str(len(result["checks"])), "checks passed before"), (f"{result['seconds']:,.0f} s", "for all of it")],
        sections=[
            ("Picture", "Bars are medians, lines quartiles.", figures.show_plots(draw_panels(result))),
            *tables,
        ],
        environment=environment,
    )


def list_tables(result: Result) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Yield the title of each table, its columns, its rows, and further ratios in words."""
    for size in list_batch_sizes(result):
        for phase in ("training", "inference"):
            rows = select_rows(result["networks"], batch_size=size, phase=phase)
            ratios = [
                f"{r['first']} / {r['second']}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}) of the time"
                for r in select_rows(result["ratios"], batch_size=size, phase=phase)
            ]
            columns = ["network", "ms", "images/s", "/ plain", "MB held", "MB moved/image"]
            yield f"{phase}, batch {size}", columns, list_networks(rows), ratios
        if not result["layers"]:  # any network's blocks are not known alone
            continue
        copied = select_rows(result["copy"], batch_size=size)[0]["gb_per_second"]["median"]
        title = f"block tail, forward and backward, batch {size} (a copy moves {copied:.1f} GB/s)"
        columns = ["shape", "variant", "ms", "MB moved", "of copy", "/ plain", "/ timm"]
        yield title, columns, list_layers(select_rows(result["layers"], batch_size=size)), []


def list_networks(rows: Sequence[NetworkRow]) -> list[list[str]]:
    """Return one row for each network: time, rate, ratio to the plain one, memory, bytes."""
    base = next(row for name in BASES for row in rows if row["variant"] == name)
    cells: list[list[str]] = []
    for row in rows:
        held, moved = row.get("memory_mb"), row["moved_mb_per_image"]
        cells.append(
            [
                row["variant"],
                format_three_digits(row["ms"]["median"]),
                format_three_digits(row["images_per_second"]),
                format_ratio(row, base),
                "" if held is None else f"{held:.0f}",
                "" if moved is None else f"{moved:.0f}",
            ]
        )
    return cells


def list_layers(rows: Sequence[LayerRow]) -> list[list[str]]:
    """Return one row for each shape and variant.

    Its cells are the time, the MB moved (counted, not measured), the bandwidth relative to that of a large copy, and
    the time relative to the plain variant and to timm's.
    """
    cells: list[list[str]] = []
    for at, row in enumerate(rows):
        part = row["variant"].split()[0]
        peers = [select_rows(rows, shape=row["shape"], variant=f"{part} {peer}") for peer in ("plain", "timm")]
        is_new = at == 0 or row["shape"] != rows[at - 1]["shape"]
        cells.append(
            [
                "x".join(map(str, row["shape"][1:])) if is_new else "",
                row["variant"],
                format_three_digits(row["ms"]["median"]),
                format_three_digits(row["moved_mb"]),
                f"{row['share_of_copy']:.0%}",
                *(format_ratio(row, peer[0]) if peer else "" for peer in peers),
            ]
        )
    return cells


def format_ratio(row: NetworkRow | LayerRow, base: NetworkRow | LayerRow) -> str:
    """Return "1.05 ±0.02": the median of the time ratio, ± half the quartiles' distance; "" for ``base``."""
    if row is base:
        return ""
    r = compute_ratio(row["seconds"], base["seconds"])
    return f"{r['median']:.2f} ±{(r['high'] - r['low']) / 2:.2f}"
