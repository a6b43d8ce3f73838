"""The tasks: what a network learns, with its loss, metrics, optimizer and schedule, as LightningModules.

A task has ``monitor``, the name of the metric that selects the best checkpoint (higher is better), and ``artifacts()``,
plain data that the report draws.

Read downward: `classification` and `detection` (the two tasks), `outcome` (a detector's results and their score),
`counts` (a classifier's) and `losses` (of classification), `base` (what all tasks share), `schedule` (the learning rate
over the epochs), `means` (of an epoch's losses).
"""

from ecanet.data import DataSpec
from ecanet.errors import ConfigError
from ecanet.recipes import Recipe, suggestion
from ecanet.training.tasks.base import Task, get_data
from ecanet.training.tasks.classification import Classification
from ecanet.training.tasks.detection import Detection
from ecanet.training.tasks.schedule import learning_rate_factor

__all__ = ["TASKS", "Classification", "Detection", "Task", "build", "get_data", "learning_rate_factor"]

TASKS: dict[str, type[Classification] | type[Detection]] = {"classification": Classification, "detection": Detection}


def build(recipe: Recipe, spec: DataSpec) -> Task:
    """Return the task of ``recipe`` with a new network for data of this ``spec`` (``ecanet.data.build(…).spec``).

    Raises:
        ConfigError: the task or the network does not exist, or a setting does not fit it.
        CheckpointError: the weights that the recipe names cannot be used.
    """
    if recipe.task not in TASKS:
        raise ConfigError(f"unknown task {recipe.task!r}; {suggestion(recipe.task, list(TASKS))}")
    return TASKS[recipe.task](recipe, spec)
