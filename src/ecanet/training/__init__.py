"""A run: recipe, data, network, task, trainer, report.

Read downward: `trainer` (`run`, `remake_report`), `weights` (takes them out of a run), `run_dirs` (a run's directory),
`hardware` (which devices train), `averaging` (EMA), `steps` (what happens after each step), `votes` (what processes
decide together), `processes` (connects those that were started again), `stopping` (signals), `failures` (of the
machine), `gates` (for the report), `states` (what a checkpoint must have), `checkpoints` (how a run writes and finds
them), `loggers` (TensorBoard and others, by name), `detections` (`detect`), `trained` (`evaluate`, `predict`),
`sampling` (a few images, and what images a network takes), `tuning` (trains a changed network a little), `restoring`
(`restore`), `preparation` (completes a recipe), `progress` (the output of a run while it trains), `tasks` (what a
network learns and how it is scored), `graphs` (CUDA graphs of a network), `sharding` (weights shared by processes),
`detectors` (this library's and torchvision's).
"""

from ecanet.training.detections import FoundObject, ImageDetections, detect
from ecanet.training.detectors import build_detector
from ecanet.training.preparation import build_data, complete
from ecanet.training.restoring import restore
from ecanet.training.run_dirs import read_recipe
from ecanet.training.sampling import describe_images, sample_images
from ecanet.training.tasks import TASKS, Classification, Detection, Task
from ecanet.training.trained import Prediction, evaluate, image_files, predict
from ecanet.training.trainer import remake_report, run
from ecanet.training.tuning import fine_tune
from ecanet.training.weights import WrittenWeights, check_finished, write_network, write_weights

__all__ = [
    "TASKS",
    "Classification",
    "Detection",
    "FoundObject",
    "ImageDetections",
    "Prediction",
    "Task",
    "WrittenWeights",
    "build_data",
    "build_detector",
    "check_finished",
    "complete",
    "describe_images",
    "detect",
    "evaluate",
    "fine_tune",
    "image_files",
    "predict",
    "read_recipe",
    "remake_report",
    "restore",
    "run",
    "sample_images",
    "write_network",
    "write_weights",
]
