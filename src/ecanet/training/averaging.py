"""The exponential moving average of a network's weights (EMA), updated without waiting for a GPU."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["MovingAverage"]


class MovingAverage(WeightAveraging):
    """Keep ``decay * average + (1 - decay) * weights`` after each step; Lightning evaluates and saves the average.

    PyTorch's own update reads its counter of steps from the GPU, for which the program waits in each step. Only whether
    a step is the first one matters here, and Lightning's callback knows that.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.average: Callable[[list[Tensor], list[Tensor], object], None] = get_ema_multi_avg_fn(decay)

    @property
    def state_key(self) -> str:
        """Return the name in checkpoints, which is that of Lightning's own callback."""
        return WeightAveraging.__name__

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the batch has completed a step."""
        if trainer.global_step <= self._latest_update_step:
            return
        averaged = self._average_model
        assert averaged is not None
        self._update(averaged.module, pl_module, first=self._latest_update_step == 0)
        averaged.n_averaged += 1  # part of the checkpoint
        self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def _update(self, averaged: nn.Module, network: nn.Module, *, first: bool) -> None:
        """Move the average towards the ``network``. The ``first`` time it becomes equal, and so do counters always."""
        floats: list[tuple[Tensor, Tensor]] = []
        for old, new in zip(_list_tensors(averaged), _list_tensors(network), strict=True):
            if first or not old.is_floating_point():
                old.copy_(new)
            else:
                floats.append((old, new))
        if floats:
            self.average([old for old, _ in floats], [new for _, new in floats], None)


def _list_tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())
