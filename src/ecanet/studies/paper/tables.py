"""Measure the paper's tables: count, time and evaluate their networks, and put each number beside the printed one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ecanet.errors import ConfigError, DataError
from ecanet.networks import find_device
from ecanet.recipes import suggestion
from ecanet.report import environment
from ecanet.studies.cost import WHY as WHY_NETWORKS
from ecanet.studies.paper.cells import Cell
from ecanet.studies.paper.costs import check_module_parameters, count_row
from ecanet.studies.paper.detection import WHY as WHY_DETECTORS
from ecanet.studies.paper.printed import TABLES
from ecanet.studies.paper.rows import Row, Table, name_checkpoint
from ecanet.studies.paper.runs import describe_wrong_data, evaluate_checkpoint, find_checkpoint, write_command
from ecanet.studies.paper.speed import add_speed, batch_size

__all__ = ["Measured", "measure_table", "run"]

MEASURES = ("params", "flops", "speed", "accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One table with its cells by row and column, the command that trains each row, and remarks on the measurement."""

    table: Table
    cells: list[dict[str, Cell]]
    commands: list[str | None]
    remarks: list[str]


def run(
    name: str | None = None,
    *,
    measure: Sequence[str] = ("params", "flops"),
    data: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
) -> list[Measured]:
    """Measure the table called ``name`` (1 to 6, poster, figure4, later), or all of them.

    Args:
        name: the table; None measures every table.
        measure: any of "params", "flops", "speed" and "accuracy". Speed is measured on this machine, as a share of the
            plain network's rate.
        data: for accuracy, a folder in ImageNet's layout, or in COCO's layout for Tables 5 and 6.
        weights: for accuracy, a folder with one checkpoint or run for each row, named as the row's command names it. A
            row without one keeps its printed accuracy.
        device: where speed is measured.

    >>> str(run("poster", measure=["params"])[0].cells[0]["#Param"])
    '11.148M ✓'

    Raises:
        ConfigError: a table, measure or device does not exist, or an argument would not be used.
        DataError: ``data`` or ``weights`` is no folder, or the data do not have the layout that the table needs.
    """
    _check_names(name, measure)
    for folder in (data, weights):
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder")
    if data is not None and name is not None and (wrong := describe_wrong_data(TABLES[name], data)):
        raise DataError(wrong)
    if "accuracy" not in measure and (data or weights):
        raise ConfigError("data and weights are used for accuracy only: add it (--measure params,flops,accuracy)")
    device = str(find_device(device))
    tables = TABLES.values() if name is None else [TABLES[name]]
    return [measure_table(table, measure, data, weights, device) for table in tables]


def _check_names(name: str | None, measure: Sequence[str]) -> None:
    if name is not None and name not in TABLES:
        raise ConfigError(f"the paper has no table {name!r}; {suggestion(name, list(TABLES))}")
    for one in measure:
        if one not in MEASURES:
            raise ConfigError(f"cannot measure {one!r}; {suggestion(one, list(MEASURES))}")
    if list(measure) == ["speed"] and name is not None and "Train FPS" not in TABLES[name].columns:
        raise ConfigError(f"the paper prints no speed in table {name}; table 3 has it")


def measure_table(
    table: Table, measure: Sequence[str], data: str | Path | None, weights: str | Path | None, device: str
) -> Measured:
    """Return ``table`` with its cells measured; `run` explains the arguments."""
    cells = [{column: Cell(printed=text) for column, text in row.printed.items()} for row in table.rows]
    remarks: list[str] = []
    if {"params", "flops"} & set(measure):
        explanations = {"FLOPs": WHY_NETWORKS, "GFLOPs": WHY_DETECTORS}
        remarks += [text for column, text in explanations.items() if column in table.columns]
    for row, found in zip(table.rows, cells, strict=True):
        found |= _count(table, row, measure)
    if "speed" in measure and "Train FPS" in table.columns:
        add_speed(table, cells, device)
        where = f"{environment()['device']}, {torch.get_num_threads()} threads, batch {batch_size(device)}"
        remarks.append(f"Speed: measured on {where}, as shares of the plain network's rate (lowest to highest).")
    if "accuracy" in measure and {"Top-1", "AP"} & set(table.columns):
        remarks += _add_accuracy(table, cells, data, weights)
    elif "AP" in table.columns:
        remarks.append("AP is as printed; --measure accuracy measures it.")
    commands = [write_command(row.model, row.detector) if row.model else None for row in table.rows]
    return Measured(table=table, cells=cells, commands=commands, remarks=remarks)


def _count(table: Table, row: Row, measure: Sequence[str]) -> dict[str, Cell]:
    """Return the row's cells of parameters and operations; Table 2's are formulas for one module's parameters."""
    if table.name == "2" and "params" in measure and row.model is not None:
        return {"#Param": check_module_parameters(row.printed["#Param"], row.model)}
    return count_row(row, measure)


def _add_accuracy(
    table: Table, cells: list[dict[str, Cell]], data: str | Path | None, weights: str | Path | None
) -> list[str]:
    """Write the accuracies of the checkpoints in ``weights`` into ``cells``; return remarks if it cannot be done."""
    if data is None or weights is None:
        return ["Accuracy was not measured: give --data-dir and --weights, or train a row as below."]
    if wrong := describe_wrong_data(table, data):
        return [f"Accuracy was not measured: {wrong}."]
    for row, found in zip(table.rows, cells, strict=True):
        if row.model is None:
            continue
        checkpoint = find_checkpoint(name_checkpoint(row.model, row.detector), Path(weights))
        if checkpoint is None:
            continue
        accuracies = evaluate_checkpoint(checkpoint, row.model, row.detector, data, masks=table.name == "6")
        for column, text in accuracies.items():
            if column in found:
                printed = row.printed[column]
                found[column] = Cell(printed=printed, here="" if text == printed else text, agrees=text == printed)
    return []
