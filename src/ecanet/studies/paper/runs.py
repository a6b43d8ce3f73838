"""The command that trains a row of the paper's tables, and the accuracy of the checkpoint that it leaves."""

from pathlib import Path
from typing import cast

from ecanet.errors import CheckpointError
from ecanet.models import read_file
from ecanet.networks import is_ours
from ecanet.recipes import DetectorConfig, ModelConfig
from ecanet.studies.paper.rows import Table, backbone_of, format_kernel_sizes, name_checkpoint

__all__ = ["describe_wrong_data", "evaluate_checkpoint", "find_checkpoint", "write_command"]

ACCURACIES = {"Top-1": "top1", "Top-5": "top5"}
"""Columns of the ImageNet tables, and the metrics of the classification task that they show."""
PRECISIONS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_S": "APS", "AP_M": "APM", "AP_L": "APL"}
"""Columns of Tables 5 and 6, and the metrics of the detection task that they show."""


def write_command(model: ModelConfig, detector: DetectorConfig | None = None) -> str | None:
    """Return the command that trains the network by the paper's recipe into runs/NAME.

    A detector with SE or ECA needs two lines: the first trains its backbone on ImageNet. The answer is None for
    networks of torchvision, which the paper did not train either.

    >>> write_command(ModelConfig(name="resnet50", attention="se"))
    'ecanet train folder:PATH --model resnet50 --attention se --out runs/resnet50-se'
    """
    if not is_ours(model.name):
        return None
    if detector is not None:
        return _write_detector_command(model, detector)
    if model.name == "mobilenet_v2":
        return _write_line("imagenet_mobilenet --set data.name=folder:PATH", model, name_checkpoint(model))
    return _write_line("folder:PATH", model, name_checkpoint(model))


def _write_line(start: str, model: ModelConfig, run_name: str, *settings: str) -> str:
    parts = [f"ecanet train {start} --model {model.name} --attention {model.attention}"]
    if sizes := format_kernel_sizes(model):
        parts.append(f"--kernel-sizes {sizes}")
    changes = (*settings, *(f"model.options.{key}={value}" for key, value in model.options.items()))
    return " ".join([*parts, *(f"--set {change}" for change in changes), f"--out runs/{run_name}"])


def _write_detector_command(model: ModelConfig, detector: DetectorConfig) -> str:
    run_name = name_checkpoint(model, detector)
    settings = [f"detector.backbone={detector.backbone}"]
    if not detector.freeze_attention:
        # The recipe starts from torchvision's backbone, in which these attentions change nothing at first.
        return _write_line("coco:PATH", model, run_name, *settings)
    backbone = backbone_of(model, detector)
    first = _write_line("folder:IMAGENET", backbone, name_checkpoint(backbone))
    settings += [
        f"model.weights=runs/{name_checkpoint(backbone)}/checkpoints/best.ckpt",
        "detector.freeze_attention=true",
    ]
    return first + "\n" + _write_line("coco:PATH", model, run_name, *settings)


def find_checkpoint(name: str, folder: Path) -> Path | None:
    """Return the checkpoint file or run directory called ``name``, with any suffix, in ``folder``; None without one."""
    candidates = [p for p in sorted(folder.glob(f"{name}*")) if p.name.split(".")[0] == name]
    # An evaluation leaves its results in a folder whose name begins like the checkpoint's. It has no checkpoints.
    return next((p for p in candidates if p.is_file() or (p / "checkpoints").is_dir()), None)


def describe_wrong_data(table: Table, data: str | Path) -> str | None:
    """Return why the folder ``data`` cannot measure the accuracies of ``table``, or None if it can."""
    is_coco = Path(data, "annotations", "instances_val2017.json").is_file()
    if "AP" in table.columns and not is_coco:
        return f"{data}: Table {table.name} needs COCO's folder, with annotations/instances_val2017.json and val2017"
    if "Top-1" in table.columns and is_coco:
        return f"{data}: this is COCO's folder, and {table.title!r} needs ImageNet's, with val/CLASS/…"
    return None


def evaluate_checkpoint(
    checkpoint: Path, model: ModelConfig, detector: DetectorConfig | None, data: str | Path, *, masks: bool = False
) -> dict[str, str]:
    """Return the accuracy of ``checkpoint`` on the held-out images in ``data``, by column, in the paper's format.

    With ``masks``, a detector's masks are evaluated (Table 6) instead of its boxes. A column is left out if no object
    in the data has its size.

    Raises:
        CheckpointError: the checkpoint belongs to another network, or is a detector's weights without its run's recipe.
        DataError: the data are missing or broken, or have other classes than the network.
    """
    from ecanet.training import evaluate

    if detector is None:
        metrics = evaluate(checkpoint, model=model, data_name=f"folder:{data}")
        return {column: f"{metrics[name]:.2f}" for column, name in ACCURACIES.items() if name in metrics}
    _check_backbone(checkpoint, model, detector)
    metrics = evaluate(checkpoint, model=model, data_name=f"coco:{data}")
    found = {column: metrics[f"mask_{name}" if masks else name] for column, name in PRECISIONS.items()}
    # COCO's evaluation returns -1 for a size that no object has.
    return {column: f"{100 * value:.1f}" for column, value in found.items() if value >= 0}


def _check_backbone(checkpoint: Path, model: ModelConfig, detector: DetectorConfig) -> None:
    path = checkpoint / "checkpoints" / "best.ckpt" if checkpoint.is_dir() else checkpoint
    content = read_file(path)
    saved = cast(dict[str, dict[str, object]], content).get("ecanet") if isinstance(content, dict) else None
    if saved is None:
        raise CheckpointError(f"{path}: not the checkpoint of a run; give the folder of a detector's run")
    recipe = cast(dict[str, dict[str, str]], saved["recipe"])
    found = (recipe["model"]["name"], recipe["detector"]["backbone"])
    expected = (model.name, detector.backbone)
    if found != expected:
        raise CheckpointError(
            f"{path}: its run trained {' over '.join(found)}, but its name says {' over '.join(expected)}; rename it"
        )
