"""A run: recipe, data, network, task, trainer, report.

Read downward: `trainer` (`run`), `checkpoints` (how a run writes and finds them), `detections` (`detect`), `trained`
(`restore`, `evaluate`, `predict`), `progress` (the output of a run while it trains), `tasks` (what a network learns and
how it is scored).
"""

from ecanet.training.detections import FoundObject, ImageDetections, detect
from ecanet.training.tasks import Classification, Detection, Task
from ecanet.training.trained import Prediction, evaluate, image_files, predict, restore
from ecanet.training.trainer import read_recipe, run

__all__ = [
    "Classification",
    "Detection",
    "FoundObject",
    "ImageDetections",
    "Prediction",
    "Task",
    "detect",
    "evaluate",
    "image_files",
    "predict",
    "read_recipe",
    "restore",
    "run",
]
