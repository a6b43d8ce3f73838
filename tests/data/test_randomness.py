"""An image's random numbers depend on the seed, the epoch and the image, and on nothing else."""

import itertools

import pytest
import torch

from ecanet import data
from ecanet.data.randomness import Draw, draw_uniform, use_sample_stream
from ecanet.recipes import DataConfig
from photographs import make_flat


def draw_in_stream(*numbers):
    with use_sample_stream(*numbers):
        return torch.rand(3)


def test_a_sample_stream_is_a_function_of_its_numbers_and_disturbs_nothing():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    found = [torch.rand(2)]
    first = draw_in_stream(0, 3, 17)
    with pytest.raises(ZeroDivisionError), use_sample_stream(0, 0, 0):
        raise ZeroDivisionError
    found.append(torch.rand(2))
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(draw_in_stream(0, 3, 17), first)
    others = [draw_in_stream(*numbers) for numbers in [(1, 3, 17), (0, 4, 17), (0, 3, 18), (0, 17, 3), (0, 3, 17, 1)]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([first, *others], 2))


def test_numbers_of_a_whole_batch_do_not_depend_on_the_batch():
    draws = [Draw(image, epoch, repeat) for image in range(40) for epoch in range(3) for repeat in range(2)]
    together = draw_uniform(7, draws, stream=1, count=4)
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = draw_uniform(7, [draws[at] for at in order], stream=1, count=4)
    assert torch.equal(mixed, together[:, order])
    alone = torch.cat([draw_uniform(7, [draw], stream=1, count=2) for draw in draws], 1)
    assert torch.equal(alone, together[:2])
    others = [draw_uniform(8, draws, stream=1, count=4), draw_uniform(7, draws, stream=2, count=4)]
    assert len(torch.stack([together, *others]).unique()) == 3 * together.numel()


def test_numbers_of_a_batch_are_uniform_and_independent():
    count = 20_000
    for draws in ([Draw(at, 0) for at in range(count)], [Draw(0, at) for at in range(count)]):
        a, b = draw_uniform(0, draws, stream=0, count=2)
        for numbers in (a, b, (a + b) % 1, (a[1:] - a[:-1]) % 1):
            assert 0 <= numbers.min() <= numbers.max() < 1
            # Counts in 10 bins: chi squared with 9 degrees of freedom is above 33.7 with probability 1e-4.
            expected = len(numbers) / 10
            found = (numbers * 10).long().bincount(minlength=10)
            assert ((found - expected) ** 2 / expected).sum() < 33.7


def read_epochs(config, *, first_epoch=0, rank=0, world=1, epochs=2):
    """Return the augmented images of each epoch by their index, as the trainer gets them."""
    module = data.build(config, seed=3)
    if config.name == "digits":
        module.train.images, module.train.labels = module.train.images[:50], module.train.labels[:50]
    module.trainer = type("Trainer", (), {"global_rank": rank, "world_size": world, "training": True})()
    module.first_epoch = first_epoch
    loader = module.train_dataloader()
    found = []
    for epoch in range(first_epoch, epochs):
        loader.sampler.set_epoch(epoch)
        images = {}
        for batch in loader:
            pixels, _ = module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
            images |= dict(zip(module.drawn, pixels, strict=True))
        found.append(images)
    return found


def check_equal(epochs, expected):
    for found, wanted in zip(epochs, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[draw], wanted[draw]) for draw in found)


@pytest.fixture(params=["digits", "photographs", "balanced"])
def config(request, tmp_path):
    """Return the settings of images that are augmented in every way there is, in batches of 12."""
    if request.param == "digits":
        return DataConfig(name="digits", batch_size=12, crop_padding=1, flip=True, random_augment=5)
    make_flat(tmp_path, {"a": 20, "b": 20} if request.param == "photographs" else {"a": 44, "b": 3})
    sampler = "balanced" if request.param == "balanced" else "shuffle"
    name = f"folder:{tmp_path}"
    return DataConfig(name=name, image_size=8, batch_size=12, workers=0, random_augment=5, sampler=sampler)


def test_augmentation_depends_on_no_process(config):
    whole = read_epochs(config)
    check_equal(read_epochs(config.but(workers=2)), whole)
    check_equal(read_epochs(config, first_epoch=1), whole[1:])
    shares = [read_epochs(config.but(batch_size=4), rank=rank, world=3) for rank in range(3)]
    check_equal([shares[0][at] | shares[1][at] | shares[2][at] for at in range(2)], whole)


def test_augmentation_changes_with_the_epoch_and_with_each_draw(config):
    first, second = (
        {(draw.image, draw.repeat): image for draw, image in images.items()} for images in read_epochs(config)
    )
    common = first.keys() & second.keys()
    # Small and dark images can look the same in two ways, but most of them do not.
    assert sum(torch.equal(first[key], second[key]) for key in common) < len(common) / 2
    again = [image for image, repeat in first if repeat]
    same = [torch.equal(first[image, 0], first[image, 1]) for image in set(again) if (image, 0) in first]
    assert sum(same) <= len(same) / 2
    if config.sampler == "balanced":
        assert same
