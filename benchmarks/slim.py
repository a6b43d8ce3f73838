"""Collect what `ecanet slim` did to trained networks, and time networks whose gates are all folded in ONNX Runtime.

    for RUN in eca-0 eca-1 se-0 se-1; do                                       # about ten minutes each on one core
        ecanet train fashion --attention ${RUN%-*} --seed ${RUN#*-} --out runs/$RUN
        ecanet slim runs/$RUN --out runs/$RUN/slim
    done
    ecanet slim runs/eca-0 --budget 0.05 --finetune 0.2 --out runs/eca-0/slim-finetune
    OMP_NUM_THREADS=1 python benchmarks/slim.py runs/*/slim* --out benchmarks/results/slim.json

The time does not depend on the weights, so the timed networks are new ones, with a budget that folds every gate. The
plain network, the one with gates and the folded one take turns; the ratio of each round is to its plain network.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import onnxruntime
import torch

import ecanet
from ecanet.deploy import time_in_turns
from ecanet.recipes import Recipe
from ecanet.report import environment, write_file
from ecanet.training import read_recipe

NETWORKS = {"resnet20": (1, 32), "resnet50": (3, 224)}
"""Timed networks: channels and side of an image, at batch 1."""


def describe_run(folder: Path) -> dict[str, object]:
    """Return what `ecanet slim` wrote into ``folder``, with the settings of the run."""
    content = json.loads((folder / "slim.json").read_text())
    recipe: Recipe = read_recipe(Path(content.pop("checkpoint")))
    settings = {"network": recipe.model.name, "attention": recipe.model.attention, "seed": recipe.seed}
    return settings | {"epochs": recipe.epochs, "data": recipe.data.name} | content


def build(name: str, attention: str, *, folded: bool) -> torch.nn.Module:
    """Return a new network, and without its gates if they are to be ``folded``."""
    torch.manual_seed(0)
    channels = NETWORKS[name][0]
    model = ecanet.create_model(name, attention=attention, num_classes=10, in_channels=channels).eval()
    if not folded:
        return model
    slimmed, report = ecanet.slim(model, torch.randn(8, channels, 32, 32), budget=0.99)
    assert len(report.folded) == len(report.gates), str(report)
    return slimmed


def open_file(model: torch.nn.Module, path: Path, image: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs ``model`` on ``image`` in ONNX Runtime, on one thread."""
    ecanet.export(model, path, target="onnx", example=image, check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: image.numpy()})


def time_network(name: str, seconds: float) -> list[dict[str, object]]:
    """Return one row for each form of the network: milliseconds, and the ratio to the plain network."""
    channels, side = NETWORKS[name]
    image = torch.randn(1, channels, side, side)
    arms = {"none": ("none", False), "eca": ("eca", False), "eca, folded": ("eca", True)}
    arms |= {"se": ("se", False), "se, folded": ("se", True)}
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            arm: open_file(build(name, attention, folded=folded), Path(folder) / f"{i}.onnx", image)
            for i, (arm, (attention, folded)) in enumerate(arms.items())
        }
        times = time_in_turns(steps, seconds=seconds)
    return [summarize(name, arm, values, times["none"]) for arm, values in times.items()]


def summarize(name: str, arm: str, values: list[float], plain: list[float]) -> dict[str, object]:
    """Return the row of one network."""
    ratios = [a / b for a, b in zip(values, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "network": name,
        "gates": arm,
        "ms": round(1e3 * statistics.median(values), 3),
        "fastest ms": round(1e3 * min(values), 3),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "ratio of the fastest": round(min(values) / min(plain), 3),
        "rounds": len(values),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slim", nargs="*", type=Path, help="directories that `ecanet slim` has written")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    times = [row for name in given.networks.split(",") for row in time_network(name, given.seconds)]
    for row in times:
        print(f"{row['network']:10}{row['gates']:14}{row['ms']:10} ms{row['ratio']:8} {row['quartiles']}")
    if given.out:
        content = {"environment": environment(), "runs": [describe_run(folder) for folder in given.slim]}
        content |= {"onnxruntime": onnxruntime.__version__, "times": times}
        write_file(given.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
