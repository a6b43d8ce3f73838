"""The sizes of a run: of the real one on a GPU, and of its rehearsal on a CPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and numbers of repetitions that all parts share."""

    device: str
    network: str
    """A ResNet whose name this library, timm and torchvision share."""
    side: int
    """Height and width of the images in pixels."""
    batch: int
    small_batch: int
    rounds: int
    """Rounds of a timing; each times every variant once."""
    calls: int
    """Calls of a step between two synchronisations."""
    steps: int
    """Training steps of the part `compare_first_steps`."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes in which the kernels are proven."""
    shapes: tuple[tuple[int, int], ...]
    """Channels and side of the planes on which each pass is timed."""
    copied: int
    """Elements of the tensor that is copied to measure the memory bandwidth."""
    product: int
    """Rows and columns of the matrices that are multiplied to measure the arithmetic."""
    compiler: str
    """Backend of `torch.compile`."""
    trace: Path | None = None
    """File for the profiler's trace."""

    @property
    def on_gpu(self) -> bool:
        """Whether the run is the real one."""
        return self.device == "cuda"

    def with_trace(self, out: Path) -> "Setting":
        """Return this setting with a file for the trace next to the JSON file ``out``."""
        return replace(self, trace=out.with_suffix(".trace.json.gz"))

    def random_images(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return random images (count, 3, side, side) in channels-last layout."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, self.side, self.side, generator=generator)
        return images.to(self.device, dtype).contiguous(memory_format=torch.channels_last)

    def labels(self, count: int) -> Tensor:
        """Return one label (of 1000) for each image."""
        return torch.arange(count, device=self.device) % 1000

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.on_gpu:
            torch.cuda.synchronize()


GPU = Setting(
    device="cuda",
    network="resnet50",
    side=224,
    batch=256,
    small_batch=32,
    rounds=5,
    calls=3,
    steps=20,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    shapes=((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)),
    copied=2**30,
    product=8192,
    compiler="inductor",
)

REHEARSAL = Setting(
    device="cpu",
    network="resnet18",
    side=32,
    batch=2,
    small_batch=2,
    rounds=2,
    calls=1,
    steps=2,
    dtypes=(torch.float32,),
    shapes=((8, 4), (16, 3)),
    copied=2**16,
    product=64,
    compiler="eager",
)
