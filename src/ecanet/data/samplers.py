"""Which images form a batch, as a function of the seed and the epoch alone; processes share each batch.

A resumed run therefore sees the images that the interrupted one would have seen.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ecanet.data.randomness import Draw, derive_seed

__all__ = ["BalancedSampler", "EpochSampler", "GroupedBatchSampler"]


class EpochSampler(Sampler[Draw]):
    """A random order of the images for each epoch, of which each of ``world`` processes gets its share.

    A step takes ``batch_size`` images in every process, so together the processes take the batch that one process would
    take with ``world`` times the batch size. An epoch has whole batches only: the rest of the order is left out. If
    there are fewer images than a batch has, they form one batch, of which some processes may get one image more.
    ``order`` is a function from a seed to the indices of all images; by default every order is equally likely.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        order: Callable[[int], NDArray[np.int64]] | None = None,
    ):
        self.images, self.batch_size = images, batch_size
        self.order = order or partial(draw_order, images)
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.position = 0, 0

    def begin(self, epoch: int, position: int) -> None:
        """Go on with ``epoch`` after the first ``position`` batches; the epochs after it are whole."""
        self.epoch, self.position = epoch, position

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        # Of a whole epoch, wherever it begins: Lightning counts on from the batches before.
        steps = self.images // (self.batch_size * self.world)
        # One process of several may have no image of the short batch; then it gets the first one once more.
        return steps * self.batch_size or max(1, len(range(self.rank, self.images, self.world)))

    def __iter__(self) -> Iterator[Draw]:
        order = self.order_images()
        padded = order * -(-self.world // len(order))  # each process needs an image
        yield from padded[self.rank :: self.world][self.position * self.batch_size : len(self)]

    def order_images(self) -> list[Draw]:
        """Return the images of the epoch in their order, for all processes."""
        indices = self.order(derive_seed(self.seed, self.epoch))
        return [Draw(index, self.epoch) for index in indices.tolist()]


def draw_order(images: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of ``images`` images in a random order."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed)).numpy()


class BalancedSampler(EpochSampler):
    """As many images of every class in each epoch, in a random order; an epoch has as many images as before.

    ``labels`` has the class of each image. Of K classes and N images, each class is drawn N / K times, rounded up for
    some classes, which change with the epoch. Within a class, no image is drawn once more before all were drawn.
    """

    def __init__(self, labels: Sequence[int], *, batch_size: int, seed: int, rank: int, world: int):
        super().__init__(len(labels), batch_size=batch_size, seed=seed, rank=rank, world=world)
        values = np.asarray(labels, dtype=np.int64)
        self.classes = [np.flatnonzero(values == label) for label in np.unique(values)]

    def order_images(self) -> list[Draw]:
        """Return the images of the epoch in their order, for all processes."""
        random = np.random.default_rng(derive_seed(self.seed, self.epoch))
        share, rest = divmod(self.images, len(self.classes))
        with_one_more = random.permutation(len(self.classes)) < rest
        drawn: list[Draw] = []
        for members, one_more in zip(self.classes, with_one_more, strict=True):
            count = share + int(one_more)
            rounds = range(-(-count // len(members)))
            # An image that is drawn again is augmented in another way.
            drawn += [Draw(int(at), self.epoch, again) for again in rounds for at in random.permutation(members)][
                :count
            ]
        return [drawn[int(at)] for at in random.permutation(len(drawn))]


class GroupedBatchSampler(Sampler[list[tuple[int, bool]]]):
    """Batches of (index, flip) pairs that group images by aspect ratio: wide ones together, and tall ones together.

    Images of one batch are padded to a common size, so a batch of both would waste computation on padding. ``wide``
    has one value per image: whether it is wider than tall. With ``flip`` half of the images are flipped, chosen at
    random. Each process gets its share of the same batches.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, *, flip: bool, seed: int, rank: int, world: int):
        self.wide, self.batch_size, self.flip = wide, batch_size, flip
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.position = 0, 0
        # Lightning calls set_epoch on the attribute `sampler` of a batch sampler.
        self.sampler = self

    def begin(self, epoch: int, position: int) -> None:
        """Go on with ``epoch`` after the first ``position`` batches; the epochs after it are whole."""
        self.epoch, self.position = epoch, position

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of ``epoch``."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return max(1, len(self.wide) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = np.asarray(torch.randperm(len(self.wide), generator=generator), dtype=np.int64).tolist()
        flip = (torch.rand(len(self.wide), generator=generator) < 0.5) & self.flip
        groups: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
        batches: list[list[tuple[int, bool]]] = []
        for index in order:
            group = groups[self.wide[index]]
            group.append((index, bool(flip[index])))
            if len(group) == self.batch_size:
                batches.append(group.copy())
                group.clear()
        # The rest of both groups forms mixed batches, the last of which may be short.
        rest = groups[True] + groups[False]
        batches += [rest[at : at + self.batch_size] for at in range(0, len(rest), self.batch_size)]
        # Batches are repeated if there are fewer than processes: each process needs one.
        batches *= -(-self.world // len(batches))
        yield from batches[self.rank :: self.world][self.position : len(self)]
