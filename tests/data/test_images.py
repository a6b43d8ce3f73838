"""Classification data: order, augmentation, class folders, and the messages for broken files."""

import gzip
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from ecanet import data
from ecanet.data import sources
from ecanet.data.augmentation import build_eval_transform, flip_images, shift_images
from ecanet.data.pictures import read_image
from ecanet.data.randomness import Draw, draw_uniform
from ecanet.data.sources import DEBIAN_FASHION_MNIST, SMALL_SETS, DataSpec, load_fashion_mnist, read_idx
from ecanet.errors import ConfigError, DataError
from ecanet.recipes.groups import DataConfig
from ecanet.report.figures import to_png


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def draws(count: int, epoch: int = 0) -> list[Draw]:
    return [Draw(at, epoch) for at in range(count)]


def batches(module: Any, loader: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the batches as the trainer moves them to the device."""
    return [module.on_before_batch_transfer(batch, 0) for batch in loader]


@pytest.fixture
def photos(tmp_path):
    """Two classes in ImageNet's layout, six and two images each, of different shapes."""
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for at in range(count):
                image = some_images(3, 40 + at, 50, seed=label * 100 + at)
                (folder / f"{at}.png").write_bytes(to_png(image))
    return tmp_path


def folder_config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"name": f"folder:{folder}", "image_size": 16, "batch_size": 4, "workers": 0, **options})


# small sets


def test_the_split_of_digits_is_fixed():
    from sklearn.datasets import load_digits

    module = data.build(DataConfig(name="digits"))
    everything: Any = load_digits()
    assert len(module.train) + len(module.held_out) == len(everything.target) == 1797
    held_out = [at for at in range(1797) if at % 5 == 0]
    assert module.held_out.labels.tolist() == [everything.target[at] for at in held_out]
    # the 17 grey levels stay distinct as bytes
    original = torch.tensor(everything.images[held_out[3]])
    assert torch.equal((module.held_out.images[3, 0].double() * 16 / 255).round(), original)
    normalized = module.spec.normalize(module.train.images)
    assert normalized.mean().abs() < 0.02
    assert (normalized.std() - 1).abs() < 0.02


def test_denormalize_inverts_normalize():
    for small in SMALL_SETS.values():
        images = torch.arange(256, dtype=torch.uint8).expand(2, small.spec.channels, 3, 256)
        assert torch.equal(small.spec.denormalize(small.spec.normalize(images)), images)


def test_class_names_are_unique():
    assert {name: len(set(s.spec.class_names)) for name, s in SMALL_SETS.items()} == {
        "digits": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100,
        "glyphs": 45, "glyphs:hard": 45, "garments": 10,
    }  # fmt: skip


def test_images_are_resized():
    module = data.build(DataConfig(name="digits", image_size=12))
    assert module.train.images.shape == (1437, 1, 12, 12)
    assert module.spec.size == 12


def test_unknown_data():
    with pytest.raises(ConfigError, match="unknown data 'fashion-mist'; did you mean 'fashion-mnist'"):
        data.build(DataConfig(name="fashion-mist"))


# idx files and Fashion-MNIST


def idx(array: Tensor) -> bytes:
    head = b"\0\0\x08" + bytes([array.ndim])
    return head + b"".join(n.to_bytes(4, "big") for n in array.shape) + bytes(array.flatten().tolist())


def write_fashion(folder: Path, *, zipped: bool) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for part, count, seed in (("train", 9, 1), ("t10k", 4, 2)):
        content[f"{part}-images-idx3-ubyte"] = some_images(count, 28, 28, seed=seed)
        content[f"{part}-labels-idx1-ubyte"] = some_images(count, seed=seed + 5) % 10
    for name, array in content.items():
        raw = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return content


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_a_folder(tmp_path, zipped, place):
    content = write_fashion(tmp_path / place, zipped=zipped)
    module = data.build(DataConfig(name="fashion-mnist", root=str(tmp_path)))
    assert torch.equal(module.train.images[:, 0], content["train-images-idx3-ubyte"])
    assert torch.equal(module.held_out.labels, content["t10k-labels-idx1-ubyte"].long())


def test_missing_fashion_mnist_names_both_remedies(tmp_path, monkeypatch):
    import torchvision

    def offline(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading\nmany lines")

    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(DataError) as caught:
        data.build(DataConfig(name="fashion-mnist"))
    message = str(caught.value)
    assert "apt install dataset-fashion-mnist" in message
    assert "download=True" in message
    assert "Error downloading" in message
    assert "\n" not in message


def test_a_missing_data_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        data.build(DataConfig(name="fashion-mnist", root=str(tmp_path / "nowhere")))


def test_broken_idx_files(tmp_path):
    write_fashion(tmp_path, zipped=True)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    for broken in (
        images.read_bytes()[:-30],
        b"hello",
        gzip.compress(b"\0\0\x0d\x01"),
        gzip.compress(idx(some_images(3, 3))[:-1]),
    ):
        images.write_bytes(broken)
        with pytest.raises(DataError, match="train-images.*cannot be read.*download the file again"):
            read_idx(images)
    images.write_bytes(gzip.compress(idx(some_images(3, 28, 28))))
    with pytest.raises(DataError, match="3 train images but 9 labels"):
        load_fashion_mnist(str(tmp_path), True)
    labels.unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte is missing"):
        load_fashion_mnist(str(tmp_path), True)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    for train, count in ((True, 60_000), (False, 10_000)):
        images, labels = load_fashion_mnist(None, train)
        assert images.shape == (count, 1, 28, 28)
        assert labels.bincount().tolist() == [count // 10] * 10
        if train:
            spec = SMALL_SETS["fashion-mnist"].spec
            assert (images.float() / 255).mean().item() == pytest.approx(spec.mean[0], abs=5e-4)
            assert (images.float() / 255).std().item() == pytest.approx(spec.std[0], abs=5e-4)


# augmentation


def test_shift_images_moves_each_image_on_its_own():
    images = some_images(200, 2, 5, 6)
    moved = shift_images(images, 2, draw_uniform(0, draws(200), stream=0, count=2))
    seen = set()
    for image, result in zip(images, moved, strict=True):
        wide = torch.zeros(2, 9, 10, dtype=torch.uint8)
        wide[:, 2:7, 2:8] = image
        shifts = [(y, x) for y in range(5) for x in range(5) if torch.equal(wide[:, y : y + 5, x : x + 6], result)]
        assert len(shifts) == 1
        seen |= set(shifts)
    # all 25 shifts occur: 200 images miss one with probability (24/25)**200 < 0.0003
    assert len(seen) == 25


def test_flip_images_flips_half():
    images = some_images(400, 1, 3, 4)
    result = flip_images(images, draw_uniform(0, draws(400), stream=1, count=1)[0])
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(result, images, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, result, images, strict=True))
    # mean 200, standard deviation 10
    assert 150 < sum(flipped) < 250


def test_only_training_is_augmented():
    module = data.build(DataConfig(name="digits", crop_padding=2, flip=True, random_augment=9))
    batch = (module.held_out.images[:50], module.held_out.labels[:50])
    module.drawn = draws(50)
    plain = module.spec.normalize(batch[0])
    module.trainer = SimpleNamespace(training=False)
    assert torch.equal(module.on_after_batch_transfer(batch, 0)[0], plain)
    module.trainer.training = True
    assert not torch.equal(module.on_after_batch_transfer(batch, 0)[0], plain)
    bare = data.build(DataConfig(name="digits"))
    bare.trainer = SimpleNamespace(training=True)
    assert torch.equal(bare.on_after_batch_transfer(batch, 0)[0], plain)


@pytest.mark.parametrize("option", [{"crop_padding": 2}, {"flip": True}, {"random_augment": 9}])
def test_each_augmentation_does_something(option):
    module = data.build(DataConfig(name="digits", **option))
    module.trainer, module.drawn = SimpleNamespace(training=True), draws(50)
    images = module.train.images[:50]
    assert not torch.equal(module.spec.denormalize(module.on_after_batch_transfer((images, images), 0)[0]), images)


def test_evaluation_crops_the_center():
    spec = DataSpec(class_names=("a",), channels=1, size=8, mean=(0.0,), std=(1.0,), crop=0.5)
    # resizing keeps a horizontal ramp; its central half lies between 1/4 and 3/4 of the range
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 32, 32) * 8
    result = build_eval_transform(spec)(ramp)
    assert result.shape == (1, 8, 8)
    assert result[0, 0].tolist() == pytest.approx([8 * (8 + 2 * at + 0.5) for at in range(8)], abs=4)
    assert build_eval_transform(spec)(some_images(1, 20, 60)).shape == (1, 8, 8)


# order


def fake_trainer(rank: int, world: int) -> SimpleNamespace:
    return SimpleNamespace(global_rank=rank, world_size=world, training=True)


def order(epoch: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> list[int]:
    module = data.build(DataConfig(name="digits", batch_size=100), seed=seed)
    module.trainer = fake_trainer(rank, world)
    module.load_state_dict({"first_epoch": epoch})
    return [draw.image for draw in module.train_dataloader().sampler]


def test_the_order_depends_on_seed_and_epoch_alone():
    # 14 batches of 100 images; the last 37 are left out
    assert len(set(order(3))) == 1400
    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3) != order(3, seed=1)


def test_neighbouring_seeds_have_different_orders():
    assert order(1, seed=0) != order(0, seed=1)


def test_more_processes_than_held_out_images_are_refused(photos):
    module = data.build(folder_config(photos))
    module.trainer = fake_trainer(0, 5)
    with pytest.raises(DataError, match="5 processes cannot share 4 held-out images"):
        module.val_dataloader()


@pytest.mark.parametrize("setting", [{"eval_crop": 0.5}, {"interpolation": "bicubic"}])
def test_small_images_are_evaluated_whole(setting):
    with pytest.raises(DataError, match=f"{next(iter(setting))} is for photographs"):
        data.build(DataConfig(name="digits", **setting))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_photographs_are_resized_as_the_recipe_says(photos, interpolation):
    torch.manual_seed(0)
    module = data.build(folder_config(photos, interpolation=interpolation))
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    size, resized = module.spec.size, round(module.spec.size / module.spec.crop)
    mode = v2.InterpolationMode(interpolation)
    expected = v2.functional.center_crop(v2.functional.resize(image, [resized], mode, antialias=True), [size, size])
    assert torch.equal(module.held_out.transform(image), expected)
    crop = module.train.transform.transforms[0]
    assert crop.interpolation == mode


def test_processes_share_an_epoch():
    halves = [order(1, rank=rank, world=2) for rank in (0, 1)]
    assert not set(halves[0]) & set(halves[1])
    assert len(halves[0]) == len(halves[1]) == 700


def test_processes_evaluate_each_image_once():
    module = data.build(DataConfig(name="digits", batch_size=50), train=False)
    labels = []
    for rank in range(3):
        module.trainer = fake_trainer(rank, 3)
        labels.append(torch.cat([found for _, found in batches(module, module.val_dataloader())]))
    together = torch.full((360,), -1)
    for rank in range(3):
        together[rank::3] = labels[rank]
    assert torch.equal(together, module.held_out.labels)


# folders


def test_a_folder_of_photographs(photos):
    module = data.build(folder_config(photos))
    assert module.spec.class_names == ("cat", "dog")
    assert (len(module.train), len(module.held_out)) == (12, 4)
    [(images, labels)] = batches(module, module.val_dataloader())
    assert labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(images[2], build_eval_transform(module.spec)(read_image(photos / "val/dog/0.png", 3)))
    for images, labels in batches(module, module.train_dataloader()):
        assert images.shape == (4, 3, 16, 16)
        assert images.dtype == torch.uint8
        assert len(labels) == 4


def test_workers_read_the_same_images(photos):
    [alone] = batches(m := data.build(folder_config(photos)), m.val_dataloader())
    [helped] = batches(m := data.build(folder_config(photos, workers=1)), m.val_dataloader())
    assert torch.equal(alone[0], helped[0])


def test_only_the_evaluation_part_is_needed_to_evaluate(photos):
    (photos / "train").rename(photos / "other")
    assert len(data.build(folder_config(photos), train=False).held_out) == 4
    with pytest.raises(DataError, match="train: no such folder; folder:PATH needs"):
        data.build(folder_config(photos))


def test_incomplete_class_folders_are_refused(photos):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        data.build(folder_config(photos / "nowhere"))
    (photos / "val" / "horse").mkdir()
    with pytest.raises(DataError, match="horse: train/ has no such class"):
        data.build(folder_config(photos))
    (photos / "train" / "horse").mkdir()
    with pytest.raises(DataError, match="train/horse: no images in this class folder"):
        data.build(folder_config(photos))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_a_corrupt_image_is_named_in_one_line(photos, workers, damage):
    victim = photos / "val" / "cat" / "1.png"
    victim.write_bytes(b"no image" if damage == "text" else victim.read_bytes()[:600])
    module = data.build(folder_config(photos, workers=workers))
    with pytest.raises(DataError) as caught:
        batches(module, module.val_dataloader())
    assert str(caught.value).startswith(f"{victim}: cannot be read as an image")
    assert "on_corrupt=skip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_skipped_by_choice_and_named_once(photos, capsys):
    victim = photos / "val" / "cat" / "1.png"
    victim.write_bytes(b"no image")
    module = data.build(folder_config(photos, on_corrupt="skip"))
    for _ in range(2):
        [(images, labels)] = batches(module, module.val_dataloader())
        assert (len(images), labels.tolist()) == (3, [0, 1, 1])
    assert capsys.readouterr().err.splitlines() == [f"skipped: {victim}: cannot be read as an image (not an image)"]


def test_a_batch_with_nothing_readable_is_empty(photos):
    for path in (photos / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    module = data.build(folder_config(photos, on_corrupt="skip"))
    assert all(len(images) == len(labels) == 0 for images, labels in batches(module, module.val_dataloader()))


def test_training_skips_an_unreadable_batch_and_stops_if_no_image_is_left(photos, tmp_path):
    from ecanet.recipes import ModelConfig, Recipe
    from ecanet.training.trainer import run

    data = folder_config(photos, on_corrupt="skip", batch_size=3)
    recipe = Recipe(data=data, model=ModelConfig(name="resnet8"), epochs=2)
    pictures = sorted((photos / "val").rglob("*.png"))
    for path in pictures[:3]:
        path.write_bytes(b"no image")
    assert 0 <= run(recipe, folder=tmp_path / "some", quiet=True).metrics["top1"] <= 100
    for path in pictures:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="not one held-out image could be read"):
        run(recipe, folder=tmp_path / "none", quiet=True)


def test_a_run_without_a_readable_training_image_is_refused(photos, tmp_path):
    from ecanet.recipes import ModelConfig, Recipe
    from ecanet.training.trainer import run

    for path in (photos / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    data = folder_config(photos, on_corrupt="skip", batch_size=3)
    recipe = Recipe(data=data, model=ModelConfig(name="resnet8"), epochs=1)
    with pytest.raises(DataError, match="not one training image could be read") as caught:
        run(recipe, folder=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    if kind == "pipe":
        os.mkfifo("x.jpg")
    elif kind == "folder":
        Path("x.jpg").mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x.jpg")
    with pytest.raises(DataError, match=r"^x.jpg: it is no file, but a folder, a pipe, a socket or a device$"):
        read_image("x.jpg", 3)


def test_normalization_makes_its_constants_once(monkeypatch):
    """Each new tensor on a GPU would be a copy that the GPU waits for, twice in each step."""
    spec = DataSpec(class_names=("a", "b"), channels=3, size=4, mean=(0.1, 0.2, 0.31), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.inference_mode():
        first = spec.normalize(images)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor was made"))
    again = spec.normalize(images)
    assert torch.equal(again, first)
    spec.normalize(images.float().requires_grad_()).sum().backward()  # as saliency maps need it
    assert torch.equal(spec.denormalize(again), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_values_are_scaled_to_8_bits(tmp_path, channels):
    from PIL import Image

    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", channels)[0].flatten().tolist() == list(range(256))
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff: its values are floating-point"):
        read_image(tmp_path / "float.tiff", channels)


def test_one_class_is_not_enough(photos):
    import shutil

    for part in ("train", "val"):
        for folder in sorted((photos / part).iterdir())[1:]:
            shutil.rmtree(folder)
    with pytest.raises(DataError, match="only one class"):
        data.build(folder_config(photos))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (1, "RGBA"), (3, "P"), (3, "L")])
def test_images_of_any_mode_are_converted(tmp_path, channels, mode):
    from PIL import Image

    Image.new("RGB", (7, 5), (204, 204, 204)).convert(mode).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", channels)
    assert image.shape == (channels, 5, 7)
    assert image.unique().tolist() == [204]
