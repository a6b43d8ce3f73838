"""A run: recipe, data, network, task, trainer, report.

Read downward: `trainer` (`run`), `detections` (`detect`), `trained` (`restore`, `evaluate`, `predict`), `progress`
(what is shown meanwhile), `tasks` (what is learned and how it is scored).
"""

from ecanet.training.detections import detect
from ecanet.training.tasks import Classification, Detection, Task
from ecanet.training.trained import Prediction, evaluate, image_files, predict, restore
from ecanet.training.trainer import read_recipe, run

__all__ = [
    "Classification",
    "Detection",
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
