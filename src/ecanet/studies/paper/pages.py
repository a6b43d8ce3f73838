"""The paper's tables as measured here, written down: Markdown, JSON, and pictures like its Figures 1 and 4."""

import json
from collections.abc import Sequence
from pathlib import Path

from ecanet.report import environment, figures, write_file
from ecanet.studies.paper.rows import FIGURE_4, FOOTNOTES, TABLE_3, Table
from ecanet.studies.paper.tables import Measured


def write(tables: Sequence[Measured], folder: Path) -> None:
    """Write paper.md, paper.json, figure1.png and figure4.png into ``folder``."""
    write_file(folder / "paper.md", markdown(tables))
    write_file(folder / "paper.json", to_json(tables))
    write_file(folder / "figure1.png", figure_1())
    write_file(folder / "figure4.png", figure_4())


def markdown(tables: Sequence[Measured]) -> str:
    """The tables as Markdown, each with its remarks, footnotes and the commands that train its rows."""
    return "\n\n".join(_markdown(measured) for measured in tables) + "\n"


def _markdown(measured: Measured) -> str:
    table = measured.table
    used = list(dict.fromkeys(note for row in table.rows for note in row.notes))
    lines = [f"## {_heading(table)}", ""]
    lines += [_line([*table.columns, "notes"]), _line(["---"] * (len(table.columns) + 1))]
    for row, cells in zip(table.rows, measured.cells, strict=True):
        marks = " ".join(str(used.index(note) + 1) for note in row.notes)
        lines.append(_line([*(str(cells[column]) for column in table.columns), marks]))
    lines += ["", *_agreement(measured)]
    lines += ["", *measured.remarks] if measured.remarks else []
    lines += ["", *(f"{i}. {FOOTNOTES[note]}" for i, note in enumerate(used, 1))] if used else []
    commands = list(dict.fromkeys(line for c in measured.commands if c for line in c.splitlines()))
    folders = "COCO's folder; IMAGENET: ImageNet's, for backbones" if "AP" in table.columns else "ImageNet's folder"
    lines += ["", f"To train a row (PATH: {folders}):", "", *(f"    {c}" for c in commands)] if commands else []
    return "\n".join(lines)


def _agreement(measured: Measured) -> list[str]:
    """How many cells agree with the printed ones, the authors' own counts apart from those they copied."""
    lines = []
    for own, whose in ((True, "counted by the authors"), (False, "not counted by the authors or not said to be")):
        rows = zip(measured.table.rows, measured.cells, strict=True)
        cells = [c for row, found in rows if row.own is own for c in found.values() if c.agrees is not None]
        if cells:
            cut = sum(bool(c.agrees and c.here) for c in cells)
            note = f", {cut} of them cut instead of rounded" if cut else ""
            lines.append(f"Of {len(cells)} cells {whose}, {sum(c.agrees is True for c in cells)} agree{note}.")
    return lines


def _heading(table: Table) -> str:
    title = {"poster": "Poster", "figure4": "Figure 4"}.get(table.name, f"Table {table.name}")
    return f"{title}: {table.title}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_json(tables: Sequence[Measured]) -> str:
    """The same as JSON, with the machine it was measured on."""
    content = [
        {
            "name": m.table.name,
            "title": m.table.title,
            "remarks": m.remarks,
            "rows": [
                {
                    "cells": {c: {"printed": x.printed, "here": x.here, "agrees": x.agrees} for c, x in cells.items()},
                    "own": row.own,
                    "notes": [FOOTNOTES[note] for note in row.notes],
                    "command": line,
                }
                for row, cells, line in zip(m.table.rows, m.cells, m.commands, strict=True)
            ],
        }
        for m in tables
    ]
    return json.dumps({"environment": environment(), "tables": content}, indent=2, ensure_ascii=False)


def figure_1() -> bytes:
    """A PNG like Figure 1, from Table 3's printed numbers: Top-1 against parameters, area proportional to FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="Parameters (M)", ylabel="Top-1 (%)")
    residual = [row.printed for row in TABLE_3.rows if row.printed["Backbone"].startswith("R-")]
    for i, method in enumerate(dict.fromkeys(row["Method"] for row in residual)):
        rows = [row for row in residual if row["Method"] == method]
        x, y, flops = ([float(row[c].rstrip("MG")) for row in rows] for c in ("#Param", "Top-1", "FLOPs"))
        names = [row["Backbone"] for row in rows]
        (line,) = axes.plot(x, y, linewidth=1, alpha=0.6, color="tab:red" if "ECA" in method else f"C{i + (i > 2)}")
        axes.scatter(x, y, s=[60 * f for f in flops], alpha=0.5, color=line.get_color(), label=method)
        for point in zip(x, y, names, strict=True):
            if method in ("ResNet", "ECA-Net (ours)"):
                axes.annotate(point[2], point[:2], ha="center", va="center", fontsize=7)
    legend = axes.legend(loc="lower right", fontsize=8, title="area: FLOPs", title_fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    axes.margins(0.12)
    return figures.to_png(figure)


def figure_4() -> bytes:
    """A PNG like Figure 4, from its digitised points: Top-1 against k, the adaptive network and SENet as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="Kernel size k", ylabel="Top-1 (%)")
    for color, name in (("tab:blue", "ECA-Net50"), ("tab:red", "ECA-Net101")):
        top1 = {
            row.printed["k"]: float(row.printed["Top-1"]) for row in FIGURE_4.rows if row.printed["Backbone"] == name
        }
        sizes = [k for k in top1 if k.isdigit()]
        axes.plot([int(k) for k in sizes], [top1[k] for k in sizes], "o-", color=color, label=f"{name}, fixed k")
        axes.axhline(top1["adaptive"], color=color, linestyle="--", linewidth=1, label=f"{name}, adaptive k")
        axes.axhline(top1["SENet"], color=color, linestyle=":", linewidth=1, label=name.replace("ECA-Net", "SENet"))
    axes.set_xticks([3, 5, 7, 9])
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    return figures.to_png(figure)
