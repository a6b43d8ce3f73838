"""Time trained networks in other runtimes, in float32, without the gates that `ecanet slim` folds, and in int8.

    for RUN in none-0 eca-0 se-0 cbam-0; do
        ecanet train fashion --attention ${RUN%-*} --seed ${RUN#*-} --out runs/$RUN
        ecanet slim runs/$RUN --out runs/$RUN/slim            # of eca and se
    done
    OMP_NUM_THREADS=1 python benchmarks/deploy_trained.py runs/none-0 runs/eca-0 runs/se-0 runs/cbam-0
    python benchmarks/deploy_trained.py --table               # print the table from the JSON file

The first run has no attention; the ratios are to it, in float32 in the same runtime. A run with ECA is also measured
with timm's module in the place of each gate, with the same weights. Files take turns as in `benchmarks/deploy.py`, and
the time is the processor's. Files in float32 have PyTorch's outputs, so their accuracy is PyTorch's; those in int8 are
run on as many held-out images. ExecuTorch's int8 files take one image at a time.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ecanet
from deploy import RUNTIMES, list_rows, run_eager, take_turns
from ecanet import ECA, deploy, training
from ecanet.deploy import TARGETS
from ecanet.deploy.preparation import find_attention
from ecanet.deploy.quantize import QUANTIZERS
from ecanet.deploy.slim_fit import find_constant_factor
from ecanet.report import environment, write_file
from ecanet.testing import measure_relative_error

RESULTS = Path(__file__).resolve().parent / "results" / "deploy-trained.json"
ROUNDS = {1: 100, 8: 20}
CALIBRATION = 512
"""Training images that give the ranges of int8."""
INT8 = ", int8"
"""The end of the names of networks in int8."""

Step = Callable[[Tensor], Tensor]


class Images(NamedTuple):
    """Images of the data that all runs share."""

    calibration: Tensor
    held_out: Tensor
    labels: Tensor


def main() -> int:
    """Run what is asked for and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="directories of `ecanet train`, the plain network first")
    parser.add_argument("--images", type=int, default=2000, help="held-out images that are classified (default: 2000)")
    parser.add_argument("--rounds", type=int, help="rounds at each batch size (default: 100 and 20)")
    parser.add_argument("--table", action="store_true", help="print the table from the JSON file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    options = parser.parse_args()
    if not options.table:
        if not options.runs:
            parser.error("name the directories of the runs, or give --table")
        torch.set_num_threads(1)
        rows = measure(options.runs, options.images, options.rounds)
        command = f"OMP_NUM_THREADS=1 python benchmarks/deploy_trained.py {' '.join(map(str, options.runs))}"
        about = environment() | {"command": command, "threads": 1, "time": "processor time", "images": options.images}
        write_file(options.out, json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    print(make_table(json.loads(options.out.read_text())["rows"]))
    return 0


def list_networks(runs: list[Path]) -> Iterator[tuple[str, nn.Module]]:
    """Yield a name and the trained network of each run, of its slim form, and of ECA by timm's modules."""
    for run in runs:
        task = training.restore(run)
        name = "plain" if task.recipe.model.attention == "none" else task.recipe.model.attention
        yield name, task.model
        if name == "eca":
            yield "timm's eca", put_timms_gates(task.model)
        if (run / "slim" / "slim.pth").exists():
            yield f"{name}, slim", remove_neutral_gates(training.restore(run / "slim" / "slim.pth").model)


def put_timms_gates(network: nn.Module) -> nn.Module:
    """Return a copy with timm's module, of the same weights, in the place of each ECA."""
    from timm.layers import EcaModule  # pyright: ignore[reportPrivateImportUsage]

    network = copy.deepcopy(network)
    for name, gate in [(name, one) for name, one in network.named_modules() if isinstance(one, ECA)]:
        module = EcaModule(kernel_size=gate.conv.kernel_size[0])
        module.conv.load_state_dict(gate.conv.state_dict())
        network.set_submodule(name, module.eval())
    return network


def remove_neutral_gates(network: nn.Module) -> nn.Module:
    """Return the network without the gates that `slim` folded: a run's file has them as neutral ones, 2 sigmoid(0)."""
    network = copy.deepcopy(network)
    for name in find_attention(network):
        factor = find_constant_factor(network.get_submodule(name))
        if factor is not None and torch.equal(factor, torch.ones_like(factor)):
            network.set_submodule(name, nn.Identity())
    return network


def measure(runs: list[Path], count: int, rounds: int | None) -> list[dict[str, Any]]:
    """Return one row a runtime, network, precision and batch size."""
    task = training.restore(runs[0])
    data = training.build_data(task.recipe, split=task.split)
    calibration, _ = training.sample_images(data, CALIBRATION, train=True)
    images = Images(calibration, *training.sample_images(data, count, train=False))
    found: dict[Any, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        networks = dict(list_networks(runs))
        if next(iter(networks)) != "plain":
            sys.exit(f"{runs[0]} has attention; the first run is the plain network that the others are compared with")
        int8: dict[Any, Step] = {}
        for at, (name, network) in enumerate(networks.items()):
            for target in QUANTIZERS:
                path = Path(folder) / f"{at}-int8-{target}{TARGETS[target].suffix}"
                int8[target, name + INT8], found[target, name + INT8] = quantize(network, path, target, images)
        for batch, most in ROUNDS.items():
            x = images.held_out[:batch].contiguous()
            steps = {}
            for at, (name, network) in enumerate(networks.items()):
                for runtime, step, known in open_float32(network, Path(folder) / f"{at}-float32", x):
                    steps[runtime, name] = partial(step, x)
                    top1 = found.get(("onnx", name + INT8), {}).get("float32 top1")
                    found[runtime, name] = known | {"top1": top1}
            for (target, name), step in int8.items():
                if QUANTIZERS[target].batch in (None, batch):
                    steps[target, name] = partial(step, x)
            rows += list_rows(take_turns(steps, rounds or most), found, batch)
    return rows


def quantize(network: nn.Module, path: Path, target: str, images: Images) -> tuple[Step, dict[str, Any]]:
    """Return the function that runs the network's int8 file, and what is known of the file."""
    held_out = (images.held_out, images.labels)
    report = deploy.quantize(network, path, target=target, calibration=images.calibration, held_out=held_out)
    print(f"{path.name}: top-1 {report.before:.2f} in float32, {report.after:.2f} in int8", flush=True)
    known = {"bytes": report.bytes, "top1": report.after, "float32 top1": report.before, "same": report.agreement}
    return QUANTIZERS[target].open(path), known


def open_float32(network: nn.Module, path: Path, x: Tensor) -> Iterator[tuple[str, Step, dict[str, Any]]]:
    """Yield each runtime, the function that runs the network there, and what is known of its file.

    Raises:
        AssertionError: a file's outputs are not PyTorch's.
    """
    expected = run_eager(network, x)
    yield "eager", lambda x: run_eager(network, x), {"bytes": 4 * sum(p.numel() for p in network.parameters())}
    for target in QUANTIZERS:
        own = f"-{len(x)}" if target == "executorch" else ""  # whose files take one batch size
        file = path.with_name(f"{path.name}-{target}{own}{TARGETS[target].suffix}")
        if not file.exists():
            ecanet.export(network, file, target=target, example=x, check=False)
        session = TARGETS[target].open(file)
        error = measure_relative_error(session.run([x]), [expected])
        assert error < 1e-4, (file.name, error)
        size = sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
        yield target, lambda x, session=session: session.run([x])[0], {"bytes": size, "error": error}


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table at batch 1: one row a runtime and network, in float32 and then in int8."""
    found = {(row["runtime"], row["variant"]): row for row in rows if row["batch"] == 1}
    values = "MB | top-1 | ms | over plain"
    lines = [f"| runtime | network | {values} | int8: {values} |", f"|{'---|' * 10}"]
    for runtime, variant in (key for key in found if not key[1].endswith(INT8)):
        cells = [RUNTIMES[runtime], variant]
        for row in (found[runtime, variant], found.get((runtime, variant + INT8))):
            cells += [""] * 4 if row is None else describe(row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(row: dict[str, Any]) -> list[str]:
    """Return the four cells of one file."""
    ratio = "" if row["variant"] == "plain" else f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    return [f"{row['bytes'] / 1e6:.2f}", f"{row['top1']:.2f}", f"{row['ms']:.2f}", ratio]


if __name__ == "__main__":
    sys.exit(main())
