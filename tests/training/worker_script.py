"""One process of a run, for tests that start several: `python worker_script.py FOLDER IMAGES [norms] [stop at batch]`.

``norms`` is "own" (each process's), "halves" (one process computes as two would: each half of a batch has statistics of
its own, and those of the first half are kept) or "synchronised" (over all processes; PyTorch's own is for GPUs alone).
The images that each process draws are appended to FOLDER/drawn-RANK.txt, a line for each step.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ecanet import training
from ecanet.training import hardware
from ecanet.training.tasks import Classification, get_data
from tiny_runs import add_tiny


class Watch(L.Callback):
    """Writes down what is drawn, and ends the process, as a kill would, after a number of batches."""

    def __init__(self, folder: Path, last: int):
        self.path, self.last = folder / f"drawn-{os.environ.get('RANK', '0')}.txt", last

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.path.open("a") as file:
            images = " ".join(str(draw.image) for draw in get_data(trainer).drawn)
            file.write(f"{trainer.current_epoch} {batch_idx} {images}\n")
        self.last -= 1
        if not self.last:
            os._exit(5)


def forward_by_halves(plain: Any) -> Any:
    def forward(self: Classification, x: Tensor) -> Tensor:
        if not self.training:
            return plain(self, x)
        first = plain(self, x[0::2])
        kept = [value.clone() for value in self.model.buffers()]
        second = plain(self, x[1::2])
        for value, old in zip(self.model.buffers(), kept, strict=True):
            value.data.copy_(old)  # the backward pass need not know
        out = torch.empty(len(x), first.shape[1])
        out[0::2], out[1::2] = first, second
        return out

    return forward


class SumTogether(torch.autograd.Function):
    """The sum over processes; the gradient of all losses' sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumTogether.forward(ctx, gradient)


def normalize_together(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    values = x.transpose(0, 1).flatten(1).double()
    *sums, count = SumTogether.apply(
        torch.cat([values.sum(1), (values * values).sum(1), values.new_tensor([values.shape[1]])])
    )
    mean, square = (torch.stack(sums) / count).float().chunk(2)
    variance = square - mean * mean
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
    shape = (1, -1, 1, 1)
    scale = self.weight * (variance + self.eps).rsqrt()
    return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def main(folder: Path, images: int, norms: str = "own", last: int = -1) -> None:
    patch = pytest.MonkeyPatch()
    add_tiny(patch, images)
    if norms == "halves":
        patch.setattr(Classification, "forward", forward_by_halves(Classification.forward))
    if norms == "synchronised":
        patch.setattr(hardware, "_check_cpu", lambda *_: None)
        patch.setattr(nn.SyncBatchNorm, "forward", normalize_together)
        patch.setattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)
    recipe = training.read_recipe(folder)
    training.run(recipe, folder=folder, resume="auto", device="cpu", callbacks=[Watch(folder, last)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:]))
