"""Random numbers of one training image: a function of the run's seed, the epoch and the image alone.

Whatever is drawn for an image is then the same with any number of worker processes and devices, in any order, and in a
run that was resumed in the middle of an epoch.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Draw", "derive_seed", "draw_uniform", "use_sample_stream"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the step of the generator SplitMix64."""


class Draw(NamedTuple):
    """An ``image`` that a sampler has drawn (its index), the ``epoch``, and how often that has drawn it before."""

    image: int
    epoch: int
    repeat: int = 0


def derive_seed(*numbers: int) -> int:
    """Return one seed of 32 bits for several ``numbers``; PyTorch's CPU generator uses no more than 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def use_sample_stream(seed: int, epoch: int, index: int, repeat: int = 0) -> Generator[None]:
    """Give PyTorch's random functions a stream of their own in this context: that of one image in one epoch.

    The transforms of torchvision draw from PyTorch's default generator on the CPU. Afterwards it has the state of
    before, so nothing else depends on how many images were read.

    >>> with use_sample_stream(seed=0, epoch=3, index=17):
    ...     first = torch.rand(2)
    >>> with use_sample_stream(seed=0, epoch=3, index=17):
    ...     bool((torch.rand(2) == first).all())
    True
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(derive_seed(seed, epoch, index, repeat))
    try:
        yield
    finally:
        generator.set_state(before)


def draw_uniform(seed: int, draws: Sequence[Draw], *, stream: int, count: int) -> Tensor:
    """Return ``count`` numbers from 0 up to 1 for each of ``draws``, as float64 (``count``, N).

    They are counter-based: a number is a function of the seed, the draw, the ``stream`` (one for each use) and its row,
    so a whole batch costs a few operations. The function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014, figure 16), applied once for each of these numbers.
    """
    columns = np.array(draws, dtype=np.uint64).reshape(len(draws), 3).T
    state = np.full((1, 1), seed, dtype=np.uint64)
    for values in (np.array([stream], dtype=np.uint64), *columns, np.arange(count, dtype=np.uint64)[:, None]):
        state = _mix(state + (values + np.uint64(1)) * GOLDEN)
    return torch.as_tensor((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)  # the upper 53 bits


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each number of 64 bits changed so that every bit of it changes half of the bits of the result."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
