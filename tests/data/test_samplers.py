"""The balanced sampler: as many images of every class, whatever the counts, the epoch and the number of processes."""

from collections import Counter

import pytest
import torch

from ecanet.data.samplers import BalancedSampler, EpochSampler
from ecanet.errors import ConfigError
from ecanet.recipes import DataConfig
from photographs import flat, make_flat

CASES = [[3, 3], [1, 9], [2, 50, 7], [40, 1, 1, 1], [5, 4, 3, 2, 1, 30, 11]]


def draw(
    labels: list[int], *, seed: int = 0, epoch: int = 0, rank: int = 0, world: int = 1, batch_size: int = 1
) -> list[int]:
    sampler = BalancedSampler(labels, batch_size=batch_size, seed=seed, rank=rank, world=world)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    assert len({(one.image, one.repeat) for one in drawn}) == len(drawn)
    return [one.image for one in drawn]


def repeat(counts: list[int]) -> list[int]:
    """Return labels of which the k-th class has ``counts[k]``, mixed, and with a gap between the numbers."""
    labels = [2 * label for label, count in enumerate(counts) for _ in range(count)]
    return [labels[at] for at in torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).tolist()]


@pytest.mark.parametrize("counts", CASES)
def test_every_class_is_drawn_equally_often(counts):
    labels = repeat(counts)
    for epoch in range(3):
        drawn = draw(labels, epoch=epoch)
        assert len(drawn) == len(labels)
        by_class = Counter(labels[at] for at in drawn)
        assert set(by_class) == set(labels)
        assert max(by_class.values()) - min(by_class.values()) <= 1
        # Within a class, no image is drawn twice more often than another.
        for label in set(labels):
            times = [drawn.count(at) for at in range(len(labels)) if labels[at] == label]
            assert max(times) - min(times) <= 1


@pytest.mark.parametrize("counts", CASES)
@pytest.mark.parametrize(("world", "batch_size"), [(2, 1), (3, 1), (2, 3), (4, 2), (3, 40)])
def test_processes_share_the_batches_of_one(counts, world, batch_size):
    labels = repeat(counts)
    together = batch_size * world
    alone = draw(labels, seed=5, epoch=2, batch_size=together)
    shares = [draw(labels, seed=5, epoch=2, rank=rank, world=world, batch_size=batch_size) for rank in range(world)]
    batches = [alone[at : at + together] for at in range(0, len(alone), together)]
    for step, batch in enumerate(batches):
        parts = [share[step * batch_size : (step + 1) * batch_size] for share in shares]
        assert sorted(one for part in parts for one in part) == sorted(batch)
    assert all(len(share) <= len(batches) * batch_size for share in shares)


def test_each_of_many_processes_has_an_image():
    shares = [list(EpochSampler(2, batch_size=4, seed=0, rank=rank, world=5)) for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5
    assert {draw.image for share in shares for draw in share} == {0, 1}


def test_the_draw_depends_on_seed_and_epoch_alone():
    labels = repeat([20, 5, 2])
    assert draw(labels, epoch=3) == draw(labels, epoch=3)
    assert draw(labels, epoch=3) != draw(labels, epoch=4)
    assert draw(labels, epoch=3) != draw(labels, epoch=3, seed=1)
    assert draw(labels, seed=0, epoch=1) != draw(labels, seed=1, epoch=0)
    # The images that do not go round evenly change with the epoch, and so do the classes that get one more.
    others = repeat([9, 8, 9])
    counts = [Counter(others[at] for at in draw(others, epoch=epoch)) for epoch in range(9)]
    first = [min(count, key=lambda label: count[label]) for count in counts]
    assert len(set(first)) > 1
    seen = {at for epoch in range(9) for at in draw(labels, epoch=epoch)}
    assert seen == set(range(27))


def test_classes_are_not_drawn_in_blocks():
    labels = repeat([60, 3])
    halves = draw(labels)[:31], draw(labels)[31:]
    # About half of each half; a hypergeometric count is outside of 5 to 26 with probability below 1e-6
    assert all(5 < sum(labels[at] == 0 for at in half) < 27 for half in halves)


def test_the_setting_reaches_the_loader(tmp_path):
    make_flat(tmp_path, {"a": 50, "b": 5})
    module = flat(tmp_path, sampler="balanced", batch_size=4)
    batches = [module.on_before_batch_transfer(batch, 0) for batch in module.train_dataloader()]
    drawn = [label for _, labels in batches for label in labels]
    assert abs(sum(int(label) for label in drawn) - len(drawn) / 2) <= 2
    orders = []
    for epoch in (0, 0, 1):
        module.first_epoch = epoch
        orders.append(list(module.train_dataloader().sampler))
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(ConfigError, match="sampler must be 'shuffle' or 'balanced', got 'even'"):
        DataConfig(sampler="even")  # type: ignore
