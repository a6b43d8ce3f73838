"""Write the GPU part of docs/performance.md from the JSON file of `benchmarks/gpu.py`.

    python benchmarks/gpu_page.py benchmarks/results/gpu-h100.json
    python benchmarks/gpu_page.py                                     # no measurement: one line says so

Everything between the two marks of the page is replaced. Losses are shown like wins, and parts that failed or were
skipped are named.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- gpu.json -->\n", "<!-- end of gpu.json -->\n"
NOTHING = "**No GPU was available: no GPU time on this page or in the repository is measured.**\n"
RATIOS = ("ecanet eca / ecanet plain", "ecanet eca / timm eca", "ecanet eca / torchvision plain")


def write_part(record: dict[str, Any] | None) -> str:
    """Return the GPU part of the page: tables of ``record``, or the line that there is none.

    Raises:
        ValueError: the record is that of a rehearsal.
    """
    if record is None:
        return NOTHING
    if record["rehearsal"]:
        raise ValueError("this is a rehearsal on a CPU, whose figures say nothing about a GPU; give a GPU's file")
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "cuda", "cudnn") if record.get(name))
    lines = [
        f"Measured on one {record['device']} ({versions}, commit {record['commit']}) on {record['date'][:10]} by "
        f"`{record['command']}`. Median and quartiles; a ratio divides times of the same round (below 1 the first is "
        "faster).",
        "",
    ]
    for name, figures in list_timings(record["parts"]):
        lines += [*write_table(name, figures), ""]
    for name, part in record["parts"].items():
        lines += [f"{name} {state}: {part[state]}" for state in ("skipped", "failed") if state in part]
    return "\n".join(lines).rstrip() + "\n"


def list_timings(parts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the figures of each part, or form of a part, in which networks were timed."""
    for name, part in parts.items():
        figures = part.get("figures", {})
        if "images_per_second" in figures:
            yield name, figures
            continue
        for form, inner in figures.items():
            if isinstance(inner, dict) and "images_per_second" in inner:
                yield f"{name}, {form}", inner


def write_table(name: str, figures: dict[str, Any]) -> list[str]:
    """Return the lines of a table: the networks, fastest first, and then the ratios."""
    rates, found = figures["images_per_second"], figures["ratios"]
    return [
        f"| {name}, batch {figures['batch']} | ms | images/s |",
        "|---|---|---|",
        *(
            f"| {network} | {write_spread(spread, 2)} | {rates[network]:,.0f} |"
            for network, spread in sorted(figures["ms"].items(), key=lambda row: row[1]["median"])
        ),
        *(f"| {ratio} | {write_spread(found[ratio], 3)} | |" for ratio in RATIOS if ratio in found),
    ]


def write_spread(spread: dict[str, float], digits: int) -> str:
    """Return median and quartiles."""
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


def replace_part(page: str, part: str) -> str:
    """Return the text ``page`` with ``part`` between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + part + END + rest.split(END)[1]


def main() -> int:
    """Write the page and return the exit code: 2 if the file cannot be used."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_page.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?", help="JSON file of benchmarks/gpu.py (default: none)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: docs/performance.md)")
    options = parser.parse_args()
    try:
        record = None if options.record is None else json.loads(options.record.read_text())
        part = write_part(record)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.record}: {error}")
    options.page.write_text(replace_part(options.page.read_text(), part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
