"""Record what a trained network's gates do on a few held-out images, for the run's report."""

from typing import cast

from ecanet.attention import Gate, record_gates
from ecanet.errors import ConfigError
from ecanet.report import GateSummary
from ecanet.training.tasks import Task

__all__ = ["summarize_gates"]


def summarize_gates(task: Task) -> list[GateSummary]:
    """Return what each channel gate of ``task.model`` does on ``task.sample``; empty without such gates or images.

    `ecanet inspect` reads all held-out images; these few show tendencies.
    """
    if task.sample is None or not any(isinstance(module, Gate) for module in task.model.modules()):
        return []
    modes = [(module, module.training) for module in task.modules()]
    task.eval()
    try:
        records = record_gates(task, [(task.sample, None)], 1)
    except ConfigError:  # these images reach no gate, as in a detector that finds no region: the run is worth more
        return []
    finally:
        for module, training in modes:
            module.training = training
    return [
        GateSummary(
            name=one.name.removeprefix("model."),
            mean=cast(list[float], one.mean.tolist()),  # pyright: ignore[reportUnknownMemberType]
            deviation=cast(list[float], one.deviation.tolist()),  # pyright: ignore[reportUnknownMemberType]
            alarms=one.find_alarms(),
        )
        for one in records
    ]
