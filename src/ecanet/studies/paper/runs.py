"""The command that trains a row of the paper's tables, and what the checkpoint of such a run scores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ecanet.errors import CheckpointError
from ecanet.models import read_file
from ecanet.recipes import ModelConfig
from ecanet.studies.paper.rows import Network, Table

__all__ = ["checkpoint_of", "command", "misfit", "scores"]

PRECISIONS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_S": "APS", "AP_M": "APM", "AP_L": "APL"}
"""Columns of Tables 5 and 6, and the metrics of the detection task that they show."""


def command(network: Network | None) -> str | None:
    """The command that trains a row's network by the paper's recipe, into runs/KEY; None where there is none.

    For a detector with the paper's gates it is two lines, the first of which trains the backbone.
    """
    if network is None or ":" in network.name:
        return None
    if network.detector:
        return _detector_command(network)
    mobile = network.name == "mobilenet_v2"
    start = "imagenet_mobilenet --set data.name=folder:PATH" if mobile else "folder:PATH"
    return _line(start, network.name, network)


def _line(start: str, name: str, network: Network, *settings: str) -> str:
    parts = [f"ecanet train {start} --model {name} --attention {network.attention}"]
    if network.kernel_sizes != "adaptive":
        sizes = network.kernel_sizes
        parts.append(f"--kernel-sizes {sizes if isinstance(sizes, str) else ','.join(map(str, sizes))}")
    changes = (*settings, *(f"model.options.{key}={value}" for key, value in network.options.items()))
    return " ".join([*parts, *(f"--set {change}" for change in changes), f"--out runs/{network.key}"])


def _detector_command(network: Network) -> str:
    settings = [f"detector.backbone={network.name}"]
    if network.attention not in (
        "se",
        "eca",
    ):  # torchvision's backbone, as the recipe has it; other gates start neutral
        return _line("coco:PATH", network.detector, network, *settings)
    backbone = replace(network, detector="")
    first = _line("folder:IMAGENET", backbone.name, backbone)
    settings += [f"model.weights=runs/{backbone.key}/checkpoints/best.ckpt", "detector.freeze_attention=true"]
    return first + "\n" + _line("coco:PATH", network.detector, network, *settings)


def checkpoint_of(network: Network, folder: Path) -> Path | None:
    """The checkpoint or run in ``folder`` that is named as the row's command names it, if there is one."""
    named = [p for p in sorted(folder.glob(f"{network.key}*")) if p.name.split(".")[0] == network.key]
    # an evaluation leaves its results in a folder of nearly the checkpoint's name
    return next((p for p in named if p.is_file() or (p / "checkpoints").is_dir()), None)


def misfit(table: Table, data: str | Path) -> str | None:
    """What is wrong with the folder ``data`` for measuring the accuracies of ``table``, if anything."""
    is_coco = Path(data, "annotations", "instances_val2017.json").is_file()
    if "AP" in table.columns and not is_coco:
        return f"{data}: Table {table.name} needs COCO's folder, with annotations/instances_val2017.json and val2017"
    if "Top-1" in table.columns and is_coco:
        return f"{data}: COCO's folder, and {table.title!r} needs ImageNet's, with val/CLASS/…"
    return None


def scores(network: Network, checkpoint: Path, data: str | Path, *, masks: bool = False) -> dict[str, str]:
    """What ``checkpoint`` scores on the held-out images in ``data``, by column, as the paper prints it.

    ``masks`` asks for a detector's masks (Table 6) instead of its boxes. A size that no object has is left out.

    Raises:
        CheckpointError: the weights are another network's, or a detector's without the run that says how it is built.
        DataError: data that is missing or broken, or that has other classes than the network.
    """
    from ecanet.training import evaluate

    model = ModelConfig(
        name=network.detector or network.name,
        attention=network.attention,
        kernel_sizes=network.kernel_sizes,
        options=network.options,
    )
    if not network.detector:
        metrics = evaluate(checkpoint, model=model, data_name=f"folder:{data}")
        return {c: f"{metrics[m]:.2f}" for c, m in (("Top-1", "top1"), ("Top-5", "top5")) if m in metrics}
    _check_backbone(network, checkpoint)
    metrics = evaluate(checkpoint, model=model, data_name=f"coco:{data}")
    found = {column: metrics["mask_" * masks + metric] for column, metric in PRECISIONS.items()}
    return {column: f"{100 * value:.1f}" for column, value in found.items() if value >= 0}


def _check_backbone(network: Network, checkpoint: Path) -> None:
    path = checkpoint / "checkpoints" / "best.ckpt" if checkpoint.is_dir() else checkpoint
    content: Any = read_file(path)
    if not isinstance(content, dict) or "ecanet" not in content:
        raise CheckpointError(f"{path}: no run's checkpoint; give the folder of a detector's run, or its best.ckpt")
    recipe = content["ecanet"]["recipe"]
    kept, wanted = (recipe["model"]["name"], recipe["detector"]["backbone"]), (network.detector, network.name)
    if kept != wanted:
        raise CheckpointError(
            f"{path}: a run of {' over '.join(kept)}, and its name is that of {' over '.join(wanted)}; rename it"
        )
