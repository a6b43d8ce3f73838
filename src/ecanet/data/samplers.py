"""Which images form a batch, as a function of the seed, the epoch and the process alone.

A resumed run therefore sees the images that the interrupted one would have seen.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

__all__ = ["BalancedSampler", "EpochSampler", "GroupedBatchSampler", "derive_seed"]


def derive_seed(*numbers: int) -> int:
    """Return one seed of 32 bits for several ``numbers``; PyTorch's CPU generator uses no more than 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochSampler(DistributedSampler[int]):
    """A random order of the images for each epoch, of which each process gets its share.

    ``generator`` is the random generator from which the loader seeds this process's workers in each epoch.
    """

    def __init__(self, dataset: Dataset[object], *, seed: int, rank: int, world: int, generator: torch.Generator):
        super().__init__(dataset, num_replicas=world, rank=rank, seed=seed)  # pyright: ignore[reportUnknownMemberType]
        self.run_seed, self.generator = seed, generator

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and the workers' seeds, of ``epoch``."""
        # PyTorch would add the epoch to the seed, so that epoch 1 of seed 0 had the order of epoch 0 of seed 1.
        self.seed = derive_seed(self.run_seed, epoch)
        self.generator.manual_seed(derive_seed(self.run_seed, epoch, self.rank))


class BalancedSampler(EpochSampler):
    """As many images of every class in each epoch, in a random order; an epoch has as many images as before.

    ``labels`` has the class of each image. Of K classes and N images, each class is drawn N / K times, rounded up for
    some classes, which change with the epoch. Within a class, no image is drawn once more before all were drawn.
    """

    def __init__(
        self,
        dataset: Dataset[object],
        labels: Sequence[int],
        *,
        seed: int,
        rank: int,
        world: int,
        generator: torch.Generator,
    ):
        super().__init__(dataset, seed=seed, rank=rank, world=world, generator=generator)
        values = np.asarray(labels, dtype=np.int64)
        self.classes = [np.flatnonzero(values == label) for label in np.unique(values)]
        self.images = len(values)

    def __iter__(self) -> Iterator[int]:
        """Yield this process's share of the epoch's images, as `DistributedSampler` shares them."""
        random = np.random.default_rng(self.seed)
        share, rest = divmod(self.images, len(self.classes))
        with_one_more = random.permutation(len(self.classes)) < rest
        drawn: list[int] = []
        for members, one_more in zip(self.classes, with_one_more, strict=True):
            count = share + int(one_more)
            rounds = -(-count // len(members))
            drawn += [int(at) for _ in range(rounds) for at in random.permutation(members)][:count]
        order = [drawn[int(at)] for at in random.permutation(len(drawn))]
        # Processes take equally many steps: where the images cannot be shared evenly, the first are repeated.
        padded = order * -(-self.total_size // len(order))
        return iter(padded[: self.total_size][self.rank :: self.num_replicas])


class GroupedBatchSampler(Sampler[list[tuple[int, bool]]]):
    """Batches of (index, flip) pairs that group images by aspect ratio: wide ones together, and tall ones together.

    Images of one batch are padded to a common size, so a batch of both would waste computation on padding. ``wide``
    has one value per image: whether it is wider than tall. With ``flip`` half of the images are flipped, chosen at
    random. Each process gets its share of the same batches.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, *, flip: bool, seed: int, rank: int, world: int):
        self.wide, self.batch_size, self.flip = wide, batch_size, flip
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = 0
        # Lightning calls set_epoch on the attribute `sampler` of a batch sampler.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of ``epoch``."""
        self.epoch = epoch

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
        yield from batches[self.rank :: self.world][: len(self)]
