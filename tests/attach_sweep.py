"""Attach to other people's networks and check every promise: `make sweep`, or this file as a command.

OMP_NUM_THREADS=1 python tests/attach_sweep.py                    # run all networks, write JSON and table
OMP_NUM_THREADS=1 python tests/attach_sweep.py monai timm:dla34   # run these again and replace their rows
"""

import argparse
import json
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweep_checks import RefusedError, check
from sweep_networks import EVALUATED_ONLY, LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attach-sweep.json"
TABLE = ROOT / "docs" / "attach-sweep.md"
COMMAND = "OMP_NUM_THREADS=1 python tests/attach_sweep.py"
LONGEST = 600
"""Seconds that one network may take."""

HEAD = """# Attach, architecture by architecture

Each network is built with random weights; norm affines, running statistics, layer scales and skip gains are
moved away from 0, 1 and 1e-6; then `ecanet.attach(model, "eca")` must leave evaluation and training outputs
and the gradients of all old parameters as they were, bit for bit; every gate must get a gradient, and up to
twelve of them, one at a time, must change the output; state dict, deep copy and detach must be exact.
Gates behind layers that get no gradient in the plain network either (WaveNet's last residual layer) are excepted.

A network may also be refused: `attach` says why in one line, and the network is as it was. Detectors of torchvision
are run in evaluation alone, because they need boxes for training.
"""


def run_case(library: str, name: str) -> dict[str, Any]:
    """Return one row of the table."""
    started = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name}
    try:
        torch.manual_seed(0)
        model, inputs = LIBRARIES[library][name]()
        row["family"] = type(model).__module__.rpartition(".")[2]
        row["size"] = (inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]).shape[-1]
        report = check(model, inputs, train=name not in EVALUATED_ONLY)
        row |= {"sites": len(report), "first": report[0].after, "parameters": sum(s.parameters for s in report)}
        row["result"] = "pass"
    except RefusedError as refusal:
        row |= {"result": "refused", "cause": str(refusal)}
    except Exception as error:  # the table gives every failure with its cause
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        row |= {"result": "fail", "cause": cause}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def run_limited(library: str, name: str) -> dict[str, Any]:
    """Return one row of the table; a network that takes longer than `LONGEST` fails."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {LONGEST} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        return run_case(library, name)
    finally:
        signal.alarm(0)


def make_table(results: dict[str, Any]) -> str:
    """Return the committed page."""
    lines = [HEAD, f"Made by `{results['command']}` on {results['machine']}.", ""]
    lines += [f"In all {count_results(results['rows'])}.", ""]
    for library in LIBRARIES:
        mine = [row for row in results["rows"] if row["library"] == library]
        if not mine:
            continue
        families = len({row["family"] for row in mine if "family" in row})
        title = "written here" if library == "written" else library
        lines += [f"## {title}: {count_results(mine)}, {families} families", ""]
        lines += ["| network | family | px | gates | first gate after | parameters added | result |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [make_line(row) for row in mine]
        lines.append("")
    return "\n".join(lines)


def count_results(rows: list[dict[str, Any]]) -> str:
    """Return how many networks passed, were refused and failed, in words."""
    counts = Counter(row["result"] for row in rows)
    others = [f"{counts[key]} {word}" for key, word in (("refused", "refused"), ("fail", "fail")) if counts[key]]
    return ", ".join([f"{counts['pass']} of {len(rows)} pass", *others])


def make_line(row: dict[str, Any]) -> str:
    """Return a network's line of the table."""
    result = row["result"] if row["result"] == "pass" else f"{row['result']}: {row['cause']}".replace("|", "\\|")
    cells = [row.get(key) for key in ("name", "family", "size", "sites", "first", "parameters")]
    return "| " + " | ".join("" if cell is None else str(cell) for cell in [*cells, result]) + " |"


def write(rows: list[dict[str, Any]]) -> None:
    """Write the JSON and the table, with the rows in the order of the list."""
    order = [(library, name) for library, networks in LIBRARIES.items() for name in networks]
    latest = {(row["library"], row["name"]): row for row in rows}
    machine = f"a {torch.get_num_threads()}-thread {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}"
    kept = [latest[key] for key in order if key in latest]
    results = {"command": COMMAND, "machine": machine, "rows": kept}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(make_table(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", help="LIBRARY or LIBRARY:NETWORK: run these, and keep the other rows")
    chosen = parser.parse_args().chosen
    cases = [(library, name) for library, networks in LIBRARIES.items() for name in networks]
    if chosen:
        cases = [case for case in cases if case[0] in chosen or ":".join(case) in chosen]
    rows = json.loads(RESULTS.read_text())["rows"] if chosen and RESULTS.exists() else []
    failed = 0
    for case in cases:
        rows.append(run_limited(*case))
        failed += rows[-1]["result"] == "fail"
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        write(rows)
    return int(failed > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main())
