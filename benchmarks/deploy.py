"""Time networks with attention in other runtimes, beside the plain network in the same runtime.

ResNet-50 and MobileNetV2 at 224 px, without attention, with ECA, SE and CBAM, and with timm's ECA module in the same
places, each exported by `ecanet.export` to ONNX Runtime (targets onnx and onnxruntime), OpenVINO (the file as it is,
and with its input fixed to the batch's shape before it is compiled) and ExecuTorch, beside PyTorch itself (eager, as
the network is). First every file's outputs are compared with PyTorch's. Then all files of one batch size take turns in
one process, with one thread; the time is the processor's, so that other programs on the machine count little, and a
ratio is of two times of one round. Ratios differ a little from process to process, so small differences need
several.

    OMP_NUM_THREADS=1 python benchmarks/deploy.py           # run all; write JSON after each batch size, and the plot
    python benchmarks/deploy.py --variants plain eca        # of these alone; the other rows of the file stay
    python benchmarks/deploy.py --runtimes onnx onnxruntime --rounds 60 20      # likewise, with more rounds
    python benchmarks/deploy.py --runtimes onnxruntime --variants plain eca --processes 20 --rounds 100 20
    python benchmarks/deploy.py --plot                      # draw from the JSON file, print the table
    python benchmarks/deploy.py --quick --out DIR           # ResNet-8 in two rounds, to see that everything runs

It needs `pip install 'ecanet[export,openvino,executorch]' timm`, and on one idle core about half an hour.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import nn

import ecanet
from ecanet.deploy import TARGETS
from ecanet.errors import ExportError
from ecanet.report import environment, write_file
from ecanet.report.figures import PALETTE
from ecanet.testing import measure_relative_error

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "deploy.json"
PLOT = HERE.parent / "docs" / "export.png"
FIXED = "openvino-fixed"
RUNTIMES = {
    "eager": "PyTorch",
    "onnx": "ONNX Runtime",
    "onnxruntime": "ONNX Runtime, blocked",
    "openvino": "OpenVINO",
    FIXED: "OpenVINO, one size",
    "executorch": "ExecuTorch",
}
"""Names of PyTorch, of the targets, and of OpenVINO's with a fixed input."""
VARIANTS = ("plain", "eca", "se", "cbam", "timm's eca")
ROUNDS = {1: 15, 8: 5}


def main() -> int:
    """Run what is asked for and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="beside plain, which runs too"
    )
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--rounds", nargs=2, type=int, default=list(ROUNDS.values()), help="at batch 1 and at batch 8")
    parser.add_argument("--processes", type=int, default=1, help="one after the other, each with --rounds")
    parser.add_argument("--plot", action="store_true", help="draw from the JSON file and print the table")
    parser.add_argument("--quick", action="store_true", help="ResNet-8 at 32 px in two rounds, into the folder --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON file and the plot")
    options = parser.parse_args()
    results = RESULTS if options.out is None else options.out / RESULTS.name
    plot = PLOT if options.out is None else options.out / PLOT.name
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if not options.plot:
        if options.quick and options.out is None:
            parser.error("--quick needs --out: its figures mean nothing and must not replace the published ones")
        for name in ["resnet8"] if options.quick else options.networks:
            variants = [one for one in VARIANTS if one == "plain" or one in options.variants]
            side, rounds = (32, [2, 2]) if options.quick else (224, options.rounds)
            with tempfile.TemporaryDirectory() as folder:
                for batch, count in zip(ROUNDS, rounds, strict=True):
                    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
                    new = run(name, variants, options.runtimes, x, Path(folder), count, options.processes)
                    found[name] = join(found.get(name), new)
                    write_file(results, json.dumps(found, indent=1))
    draw(found, plot)
    print(make_table(found))
    return 0


def build(name: str, variant: str) -> nn.Module:
    """Return the network with the gates of ``variant``; all variants have the same other weights."""
    from timm.layers import EcaModule

    torch.manual_seed(0)
    attention = {"plain": "none", "timm's eca": EcaModule}.get(variant, variant)
    return ecanet.create_model(name, attention=attention).eval()


def run(
    name: str, variants: list[str], runtimes: list[str], x: torch.Tensor, folder: Path, rounds: int, processes: int
) -> dict[str, Any]:
    """Return sizes, errors and times of the ``variants`` of a network in the ``runtimes``, for the batch ``x``."""
    times: dict[Any, list[float]] = {}
    found: dict[Any, Any] = {}
    for _ in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, found = pool.submit(time_files, name, variants, runtimes, x, folder, rounds).result()
        for key, values in seconds.items():
            times.setdefault(key, []).extend(values)
    command = f"OMP_NUM_THREADS=1 python benchmarks/deploy.py {' '.join(sys.argv[1:])}".rstrip()
    how = {"rounds": rounds, "processes": processes, "command": command}
    rows = [row | how for row in list_rows(times, found, len(x))]
    machine = environment() | {"threads": 1, "time": "processor time", "image size": x.shape[-1]}
    return {"environment": machine, "rows": rows}


def time_files(
    name: str, variants: list[str], runtimes: list[str], x: torch.Tensor, folder: Path, rounds: int
) -> tuple[dict[Any, list[float]], dict[Any, Any]]:
    """Return the seconds of each runtime and variant in each round, and what is known of its file."""
    torch.set_num_threads(1)
    steps, found = prepare_steps(name, variants, runtimes, x, folder)
    return take_turns(steps, rounds), found


def join(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return ``new`` with the rows of ``old`` that it does not have, whose ratios are to the plain network of old."""
    have = {(row["batch"], row["runtime"], row["variant"]) for row in new["rows"]}
    kept = [row for row in (old or {"rows": []})["rows"] if (row["batch"], row["runtime"], row["variant"]) not in have]
    return new | {"rows": [*kept, *new["rows"]]}


def take_turns(steps: dict[Any, Any], rounds: int) -> dict[Any, list[float]]:
    """Return the processor's seconds of each step in each round; the order turns from round to round."""
    times: dict[Any, list[float]] = {key: [] for key in steps}
    keys = list(steps)
    for index in range(-1, rounds):  # the first round warms up
        for key in keys[index % len(keys) :] + keys[: index % len(keys)]:
            begun = time.process_time()
            steps[key]()
            if index >= 0:
                times[key].append(time.process_time() - begun)
    return times


def list_rows(times: dict[Any, list[float]], found: dict[Any, Any], batch: int) -> list[dict[str, Any]]:
    """Return one row a runtime and variant: what is known of the file, its time, and its ratio to plain there."""
    rows = []
    for (runtime, variant), seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[runtime, "plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        minima = min(seconds) / min(times[runtime, "plain"])
        row = {"batch": batch, "runtime": runtime, "variant": variant, **found[runtime, variant]}
        timed = {"ms": 1e3 * min(seconds), "ratio": median, "low": low, "high": high, "ratio of minima": minima}
        rows.append(row | timed)
    return rows


def prepare_steps(
    name: str, variants: list[str], runtimes: list[str], x: torch.Tensor, folder: Path
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return a function for each runtime and variant that runs ``x`` there, and what is known of the file.

    Raises:
        AssertionError: a file's outputs are not PyTorch's.
    """
    steps: dict[Any, Any] = {}
    found: dict[Any, Any] = {}
    for variant in variants:
        network = build(name, variant)
        with torch.no_grad():
            expected = network(x)
        if "eager" in runtimes:
            steps["eager", variant] = lambda network=network: run_eager(network, x)
            found["eager", variant] = {"bytes": 4 * sum(p.numel() for p in network.parameters()), "error": 0.0}
        for runtime in (one for one in runtimes if one != "eager"):
            target = "openvino" if runtime == FIXED else runtime
            path = folder / f"{target}-{VARIANTS.index(variant)}{TARGETS[target].suffix}"
            if not path.exists() or target == "executorch":  # whose files take one batch size
                try:
                    ecanet.export(network, path, target=target, example=x, check=False)
                except ExportError as error:  # a row less, which the page names
                    print(f"{name}, batch {len(x)}, {target}, {variant}: {error}", flush=True)
                    continue
            size = sum(file.stat().st_size for file in folder.glob(f"{path.stem}.*"))
            session = TARGETS[target].open(fix_shape(path, x) if runtime == FIXED else path)
            error = measure_relative_error(session.run([x]), [expected])
            assert error < 1e-4, (name, variant, runtime, error)
            steps[runtime, variant] = lambda session=session: session.run([x])
            counts = {"operations": sum(session.operations.values()), "stray": session.stray}
            found[runtime, variant] = {"bytes": size, "error": error, "partitions": session.partitions, **counts}
            print(f"{name}, batch {len(x)}, {runtime}, {variant}: error {error:.1e}, {counts}", flush=True)
    return steps, found


def fix_shape(path: Path, x: torch.Tensor) -> Path:
    """Return a copy of an OpenVINO file whose input has the shape of ``x`` alone."""
    import openvino

    model = openvino.Core().read_model(str(path))
    model.reshape(list(x.shape))
    copy = path.with_name(f"fixed-{len(x)}-{path.name}")
    openvino.save_model(model, str(copy), compress_to_fp16=False)
    return copy


def run_eager(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run the network in PyTorch without gradients."""
    with torch.no_grad():
        return network(x)


def make_table(found: dict[str, Any]) -> str:
    """Return a Markdown table: one row a network, runtime and variant."""
    lines = [
        "| network | runtime | attention | MB | ms, batch 1 | over plain | ms, batch 8 | over plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, content in found.items():
        rows = {(row["runtime"], row["variant"], row["batch"]): row for row in content["rows"]}
        for runtime in RUNTIMES:
            for variant in (one for one in VARIANTS if all((runtime, one, batch) in rows for batch in ROUNDS)):
                cells = [name, RUNTIMES[runtime], variant]
                cells.append(f"{rows[runtime, variant, 1]['bytes'] / 1e6:.1f}")
                for batch in ROUNDS:
                    row = rows[runtime, variant, batch]
                    spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                    cells += [f"{row['ms']:.1f}", "" if variant == "plain" else spread]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the ratios to the plain network at batch 1, with quartiles: a panel a network, a group a runtime."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 3.4), squeeze=False, sharey=True)
    for panel, (name, content) in zip(axes[0], found.items(), strict=True):
        rows = {(r["runtime"], r["variant"]): r for r in content["rows"] if r["batch"] == 1}
        variants = [one for one in VARIANTS[1:] if ("eager", one) in rows]
        for at, (variant, color) in enumerate(zip(variants, PALETTE, strict=False)):
            runtimes = [one for one in RUNTIMES if (one, variant) in rows]
            some = [rows[runtime, variant] for runtime in runtimes]
            heights = [row["ratio"] for row in some]
            spread = [[r["ratio"] - r["low"] for r in some], [r["high"] - r["ratio"] for r in some]]
            middle = 0.2 * (at - (len(variants) - 1) / 2)
            places = [list(RUNTIMES).index(runtime) + middle for runtime in runtimes]
            panel.bar(
                places, [h - 1 for h in heights], 0.18, bottom=1, yerr=spread, label=variant, color=color, capsize=2
            )
        panel.set_xticks(range(len(RUNTIMES)), [label.replace(" ", "\n") for label in RUNTIMES.values()])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_title(name)
    axes[0][0].set_ylabel("time over plain, batch 1")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
