"""Write measured tables as Markdown, JSON and one HTML page."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from ecanet.report import environment, figures, make_table, page, write_file
from ecanet.studies.paper.cells import Cell
from ecanet.studies.paper.figures import draw_figure_1, draw_figure_4
from ecanet.studies.paper.printed import FOOTNOTES
from ecanet.studies.paper.rows import Row, Table
from ecanet.studies.paper.tables import Measured

__all__ = ["to_html", "to_json", "to_markdown", "write"]


def write(tables: Sequence[Measured], folder: Path) -> None:
    """Write paper.md, paper.json, paper.html, figure1.png and figure4.png into ``folder``."""
    write_file(folder / "paper.md", to_markdown(tables))
    write_file(folder / "paper.json", to_json(tables))
    write_file(folder / "paper.html", to_html(tables))
    write_file(folder / "figure1.png", figures.to_png(draw_figure_1()))
    write_file(folder / "figure4.png", figures.to_png(draw_figure_4()))


# Markdown


def to_markdown(tables: Sequence[Measured]) -> str:
    """Return the tables as Markdown, each with its remarks, footnotes and the commands that train its rows."""
    return "\n\n".join(_format_table(measured) for measured in tables) + "\n"


def _format_table(measured: Measured) -> str:
    table, notes = measured.table, _list_notes(measured.table)
    lines = [f"## {_heading(table)}", ""]
    lines += [_format_line([*table.columns, "notes"]), _format_line(["---"] * (len(table.columns) + 1))]
    lines += [_format_line(row) for row in _list_rows(measured, notes)]
    lines += ["", *_count_agreements(measured)]
    lines += ["", *measured.remarks] if measured.remarks else []
    lines += ["", *(f"{i}. {FOOTNOTES[note]}" for i, note in enumerate(notes, 1))] if notes else []
    if commands := _list_commands(measured):
        lines += ["", _explain_commands(table), "", *(f"    {c}" for c in commands)]
    return "\n".join(lines)


def _list_notes(table: Table) -> list[str]:
    """Return the names of the footnotes, in the order in which the rows mention them, which numbers them."""
    return list(dict.fromkeys(note for row in table.rows for note in row.notes))


def _list_rows(measured: Measured, notes: Sequence[str]) -> list[list[str]]:
    """Return the cells of each row, and the numbers of its footnotes in the last column."""
    columns = measured.table.columns
    rows: list[list[str]] = []
    for row, cells in zip(measured.table.rows, measured.cells, strict=True):
        numbers = " ".join(str(notes.index(note) + 1) for note in row.notes)
        rows.append([*(str(cells[column]) for column in columns), numbers])
    return rows


def _list_commands(measured: Measured) -> list[str]:
    return list(dict.fromkeys(line for c in measured.commands if c for line in c.splitlines()))


def _explain_commands(table: Table) -> str:
    is_coco = "AP" in table.columns
    path = "COCO's folder; IMAGENET: ImageNet's folder, for backbones" if is_coco else "ImageNet's folder"
    return f"To train a row (PATH: {path}):"


def _count_agreements(measured: Measured) -> list[str]:
    """Return how many cells agree with the printed ones, in one line for each kind of row."""
    lines: list[str] = []
    for own, whose in ((True, "counted by the authors"), (False, "copied, or of an unnamed source")):
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


# HTML


def to_html(tables: Sequence[Measured]) -> str:
    """Return one HTML page that needs no other file: the tables, and pictures like the paper's Figures 1 and 4."""
    pictures = figures.show_plots([draw_figure_1(), draw_figure_4()])
    return page(
        title="ECA-Net: the paper's tables, and what is measured here",
        subtitle="A cell shows the printed number; what is measured here stands after it.",
        tiles=[(str(len(tables)), "tables"), (str(sum(len(m.table.rows) for m in tables)), "rows")],
        sections=[
            *((_heading(m.table), " ".join(_count_agreements(m)), _show_table(m)) for m in tables),
            ("Figures 1 and 4", "Drawn anew from the numbers that the paper prints and from its Figure 4.", pictures),
        ],
        environment=environment(),
    )


def _show_table(measured: Measured) -> str:
    """Return a table in HTML, with its remarks, footnotes and commands."""
    notes = _list_notes(measured.table)
    parts = [make_table([*measured.table.columns, "notes"], _list_rows(measured, notes))]
    parts += [f"<p>{html.escape(remark)}</p>" for remark in measured.remarks]
    if notes:
        parts.append("<ol>" + "".join(f"<li>{html.escape(FOOTNOTES[note])}</li>" for note in notes) + "</ol>")
    if commands := _list_commands(measured):
        lines = html.escape("\n".join(commands))
        parts.append(
            f"<details><summary>{html.escape(_explain_commands(measured.table))}</summary><pre>{lines}</pre></details>"
        )
    return "".join(parts)


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
