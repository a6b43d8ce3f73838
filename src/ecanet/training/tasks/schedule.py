"""The learning rate over the epochs."""

import math
from typing import Any

from ecanet.errors import ConfigError
from ecanet.recipes import ScheduleConfig

__all__ = ["change_rate", "learning_rate_factor"]


def change_rate(checkpoint: dict[str, Any], rate: float) -> float | None:
    """Change the learning rates in a ``checkpoint`` if its recipe's ``learning_rate`` is not ``rate``.

    Return the rate of before, or None if it was the same. All groups of parameters change by the same factor, so gates
    keep their own.

    Raises:
        ConfigError: the rate was 0.
    """
    before: float = checkpoint["ecanet"]["recipe"]["optimizer"]["learning_rate"]
    if before == rate:
        return None
    if before == 0:
        raise ConfigError("a run with the learning rate 0 cannot go on with another one; begin a new run")
    factor = rate / before
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group["lr"] *= factor
            group["initial_lr"] *= factor
    for state in checkpoint["lr_schedulers"]:
        for name in ("base_lrs", "_last_lr"):
            state[name] = [value * factor for value in state[name]]
    return before


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
