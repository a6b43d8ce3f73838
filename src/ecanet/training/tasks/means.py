"""The means of an epoch's losses, which a checkpoint in the middle of the epoch keeps."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

__all__ = ["RunningMeans"]


class RunningMeans:
    """The mean of each named value over the images of an epoch so far, over all processes.

    Lightning's own means are lost where a run is interrupted.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.images = 0

    def reset(self) -> None:
        """Begin an epoch."""
        self.sums, self.images = {}, 0

    def add(self, values: Mapping[str, Tensor], images: int) -> None:
        """Add the mean ``values`` of a batch of ``images`` images; a GPU is not waited for."""
        for name, value in values.items():
            # Apple's GPUs have no float64.
            exact = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64) * images
            self.sums[name] = exact + self.sums.get(name, 0.0)
        self.images += images

    def compute(self) -> dict[str, float]:
        """Return the means, in every process; all processes must call this together."""
        sums, images = self._gather()
        return {name: value / images for name, value in sums.items()} if images else {}

    def state_dict(self) -> dict[str, object]:
        """Return the sums over all processes as plain values; all processes must call this together."""
        sums, images = self._gather()
        return {"sums": sums, "images": images}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the sums. Of several processes one alone may do it, because they count together."""
        self.sums = dict(cast(dict[str, float], state["sums"]))
        self.images = cast(int, state["images"])

    def _gather(self) -> tuple[dict[str, float], int]:
        """Return the sums, and the number of images, over all processes."""
        mine = {name: float(value) for name, value in self.sums.items()}, self.images
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return mine
        parts = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, mine)
        names = sorted({name for sums, _ in parts for name in sums})
        return {name: sum(sums.get(name, 0.0) for sums, _ in parts) for name in names}, sum(part[1] for part in parts)
