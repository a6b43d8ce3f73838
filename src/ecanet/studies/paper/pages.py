"""Write measured tables as Markdown and JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from ecanet.report import environment, write_file
from ecanet.studies.paper.cells import Cell
from ecanet.studies.paper.figures import draw_figure_1, draw_figure_4
from ecanet.studies.paper.printed import FOOTNOTES
from ecanet.studies.paper.rows import Row, Table
from ecanet.studies.paper.tables import Measured

__all__ = ["to_json", "to_markdown", "write"]


def write(tables: Sequence[Measured], folder: Path) -> None:
    """Write paper.md, paper.json, figure1.png and figure4.png into ``folder``."""
    write_file(folder / "paper.md", to_markdown(tables))
    write_file(folder / "paper.json", to_json(tables))
    write_file(folder / "figure1.png", draw_figure_1())
    write_file(folder / "figure4.png", draw_figure_4())


# Markdown


def to_markdown(tables: Sequence[Measured]) -> str:
    """Return the tables as Markdown, each with its remarks, footnotes and the commands that train its rows."""
    return "\n\n".join(_format_table(measured) for measured in tables) + "\n"


def _format_table(measured: Measured) -> str:
    table = measured.table
    # Footnotes are numbered in the order in which the rows mention them.
    notes = list(dict.fromkeys(note for row in table.rows for note in row.notes))
    lines = [f"## {_heading(table)}", ""]
    lines += [_format_line([*table.columns, "notes"]), _format_line(["---"] * (len(table.columns) + 1))]
    for row, cells in zip(table.rows, measured.cells, strict=True):
        numbers = " ".join(str(notes.index(note) + 1) for note in row.notes)
        lines.append(_format_line([*(str(cells[column]) for column in table.columns), numbers]))
    lines += ["", *_count_agreements(measured)]
    lines += ["", *measured.remarks] if measured.remarks else []
    lines += ["", *(f"{i}. {FOOTNOTES[note]}" for i, note in enumerate(notes, 1))] if notes else []
    commands = list(dict.fromkeys(line for c in measured.commands if c for line in c.splitlines()))
    if commands:
        is_coco = "AP" in table.columns
        path = "COCO's folder; IMAGENET: ImageNet's folder, for backbones" if is_coco else "ImageNet's folder"
        lines += ["", f"To train a row (PATH: {path}):", "", *(f"    {c}" for c in commands)]
    return "\n".join(lines)


def _count_agreements(measured: Measured) -> list[str]:
    """Return how many cells agree with the printed ones, in one line for each kind of row."""
    lines: list[str] = []
    for own, whose in ((True, "counted by the authors"), (False, "not counted by the authors or not said to be")):
        rows = zip(measured.table.rows, measured.cells, strict=True)
        cells = [cell for row, found in rows if row.own is own for cell in found.values() if cell.agrees is not None]
        if cells:
            truncated = sum(bool(cell.agrees and cell.here) for cell in cells)
            note = f", {truncated} of them truncated instead of rounded" if truncated else ""
            lines.append(f"Of {len(cells)} cells {whose}, {sum(c.agrees is True for c in cells)} agree{note}.")
    return lines


def _heading(table: Table) -> str:
    title = {"poster": "Poster", "figure4": "Figure 4", "later": "Later"}.get(table.name, f"Table {table.name}")
    return f"{title}: {table.title}"


def _format_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# JSON


def to_json(tables: Sequence[Measured]) -> str:
    """Return the same content as JSON, with the machine that measured it."""
    content = [
        {
            "name": m.table.name,
            "title": m.table.title,
            "remarks": m.remarks,
            "rows": [_row_to_dict(*parts) for parts in zip(m.table.rows, m.cells, m.commands, strict=True)],
        }
        for m in tables
    ]
    return json.dumps({"environment": environment(), "tables": content}, indent=2, ensure_ascii=False)


def _row_to_dict(row: Row, cells: dict[str, Cell], command: str | None) -> dict[str, object]:
    return {
        "cells": {c: {"printed": cell.printed, "here": cell.here, "agrees": cell.agrees} for c, cell in cells.items()},
        "own": row.own,
        "notes": [FOOTNOTES[note] for note in row.notes],
        "command": command,
    }
