"""The learning rate over the epochs."""

import math

from ecanet.recipes import ScheduleConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(schedule: ScheduleConfig, epoch: float, epochs: int) -> float:
    """Return the factor of the peak learning rate after ``epoch`` of ``epochs`` epochs.

    ``epoch`` is a fraction: 2.5 is the middle of the third epoch.

    >>> cosine = ScheduleConfig(name="cosine", warmup_epochs=2)
    >>> [round(learning_rate_factor(cosine, epoch, 10), 3) for epoch in (0.5, 2, 6, 10)]
    [0.25, 1.0, 0.5, 0.0]
    """
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    match schedule.name:
        case "cosine":
            done = (epoch - schedule.warmup_epochs) / (epochs - schedule.warmup_epochs)
            return (1 + math.cos(math.pi * min(done, 1.0))) / 2
        case "step" if schedule.milestones:
            return schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
        case "step":
            return schedule.factor ** (int(epoch) // schedule.step_epochs)
        case "exponential":
            return schedule.factor ** int(epoch)
        case "constant":
            return 1.0
