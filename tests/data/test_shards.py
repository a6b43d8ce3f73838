"""Training reads shards as it reads a folder; an epoch reads few of them at a time."""

import json
import os
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet import data, recipes
from ecanet.data import Draw, ShardDataset, ShardSet, read_shards
from ecanet.data.samplers import EpochSampler
from ecanet.data.shards import mix_shards
from ecanet.errors import DataError
from ecanet.recipes import DataConfig, ModelConfig, OptimizerConfig, Recipe
from ecanet.shards import pack
from ecanet.training import evaluate, run

Disk = namedtuple("Disk", "total used free")


def draw_photo(label: int, seed: int) -> Image.Image:
    """A square of the class's colour, with noise."""
    random = np.random.default_rng([label, seed])
    pixels = random.integers(0, 60, (12, 14, 3))
    pixels[2:9, 2:9, label] += 180
    return Image.fromarray(pixels.astype(np.uint8)).resize((44, 40))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same photographs as a folder, and packed."""
    folder = tmp_path_factory.mktemp("sets")
    for label, name in enumerate(("red", "green", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for at in range(20):
            draw_photo(label, at).save(folder / "photos" / name / f"{at}.png")
    pack(folder / "photos", folder / "packed", workers=1, shard_bytes=6_000)
    return folder


def config(sets: Path, kind: str, **options: object) -> DataConfig:
    name = {"folder": f"folder:{sets / 'photos'}", "shards": f"shards:{sets / 'packed'}"}[kind]
    return DataConfig(**{"name": name, "image_size": 16, "batch_size": 8, "workers": 0, **options})


def recipe(sets: Path, kind: str, **options: object) -> Recipe:
    images = config(sets, kind, **options)
    rate = OptimizerConfig(learning_rate=0.8)
    return Recipe(data=images, model=ModelConfig(name="resnet8"), optimizer=rate, epochs=4, seed=1)


def test_the_held_out_images_are_those_of_the_folder(sets):
    found = {}
    for kind in ("folder", "shards"):
        module = data.build(config(sets, kind), train=kind == "folder")
        assert module.spec.class_names == ("blue", "green", "red")
        items = [module.held_out[Draw(at, 0)] for at in range(len(module.held_out))]
        found[kind] = sorted((label, image.numpy().tobytes()) for image, label, _ in items)
    assert found["folder"] == found["shards"]
    assert len(found["shards"]) == 12


def test_a_run_on_shards_is_as_accurate_and_its_checkpoint_evaluates_on_the_folder(sets, tmp_path):
    accuracy = {
        kind: run(recipe(sets, kind), folder=tmp_path / kind, quiet=True).metrics["top1"]
        for kind in ("folder", "shards")
    }
    assert accuracy["shards"] >= 75
    assert abs(accuracy["shards"] - accuracy["folder"]) <= 25
    metrics = evaluate(tmp_path / "shards", data_name=f"folder:{sets / 'photos'}", device=torch.device("cpu"))
    assert metrics["top1"] >= 75


def test_workers_see_what_the_process_itself_sees(sets):
    batches = []
    for workers in (0, 2):
        module = data.build(config(sets, "shards", workers=workers), seed=4)
        batches.append([(images, labels) for images, labels, _, _ in module.train_dataloader()])
    assert len(batches[0]) == 6
    for one, two in zip(*batches, strict=True):
        assert all(map(torch.equal, one, two))


def test_an_epoch_takes_the_order_of_the_set(sets):
    module = data.build(config(sets, "shards"), seed=4)
    sampler = module.train_dataloader().sampler
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        expected = module.train.get_order(data.derive_seed(4, epoch)).tolist()
        assert [draw.image for draw in sampler] == expected[: len(sampler)]


def test_a_small_set_is_fine_tuned(sets, tmp_path):
    assert recipes.find(f"shards:{sets / 'packed'}").name == "finetune"
    assert recipes.find(f"shards:{sets / 'packed'}", scratch=True).name == "imagenet"
    index = json.loads((sets / "packed" / "index.json").read_text())
    index["train"][0]["images"] = 20_000
    (tmp_path / "index.json").write_text(json.dumps(index))
    for address in (tmp_path, "s3://bucket/set", tmp_path / "nowhere"):
        assert recipes.find(f"shards:{address}").name == "imagenet"


def test_images_have_names(sets):
    module = data.build(config(sets, "shards"))
    first = sets / "packed" / module.train.shards.files[0].name
    assert module.name_images([Draw(0, 1)]) == [f"{first}, byte {int(module.train.records['offset'][0]):,}"]


def test_settings_that_do_not_fit_are_refused(sets):
    with pytest.raises(DataError, match=r"data.val_share \(0.3\) is for a folder without held-out images"):
        data.build(config(sets, "shards", val_share=0.3))
    with pytest.raises(DataError, match=r"has no meaning for shards:.*, which is a path"):
        data.build(config(sets, "shards", root="/data"))
    with pytest.raises(DataError, match=r"data.crop_padding is for small images"):
        data.build(config(sets, "shards", crop_padding=2))


def test_a_shard_that_is_damaged_later_is_named(sets, tmp_path):
    shutil.copytree(sets / "packed", tmp_path / "packed")
    name = read_shards(str(tmp_path / "packed")).parts["train"][0].name
    content = (tmp_path / "packed" / name).read_bytes()
    (tmp_path / "packed" / name).write_bytes(content[:700] + bytes(len(content) - 700))
    with pytest.raises(DataError, match=rf"{name}, byte [\d,]+: cannot be read as an image"):
        run(recipe(tmp_path, "shards"), folder=tmp_path / "run", quiet=True)
    (tmp_path / "packed" / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file or directory\)"):
        run(recipe(tmp_path, "shards"), folder=tmp_path / "run2", quiet=True)
    assert not (tmp_path / "run2").exists(), "it was seen before the run began"
    (tmp_path / "packed" / name).write_bytes(content + bytes(512))
    with pytest.raises(DataError, match=rf"{name}: [\d,]+ bytes instead of [\d,]+"):
        data.build(config(tmp_path, "shards"))


# remote sets


@pytest.fixture
def remote(sets, tmp_path, monkeypatch):
    """The packed set in fsspec's file system in memory, and a disk with room for copies; return its address."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total=3_000, used=0, free=1_000_000))
    files = fsspec.filesystem("memory")
    for path in (sets / "packed").iterdir():
        files.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set"
    files.rm("/bucket", recursive=True)


def test_a_remote_set_is_copied_shard_by_shard(sets, remote, tmp_path):
    near = data.build(config(sets, "shards"))
    far = data.build(config(sets, "shards", name=f"shards:{remote}"))
    copies = tmp_path / "cache" / "ecanet" / "shards"
    assert not list(copies.rglob("*.tar")), "nothing is copied before it is read"
    far.held_out[Draw(0, 0)]
    assert len(list(copies.rglob("*.tar"))) == 1
    for at in range(len(near.train)):
        assert torch.equal(near.train[Draw(at, 2)][0], far.train[Draw(at, 2)][0])
    assert len(list(copies.rglob("*.tar"))) <= len(near.train.shards.files)


def test_a_copy_that_is_not_what_was_packed_is_not_kept(sets, remote, tmp_path):
    import fsspec

    shards = read_shards(remote)
    name = shards.parts["held_out"][0].name
    content = bytearray(fsspec.filesystem("memory").cat(f"/bucket/set/{name}"))
    content[900] ^= 4
    fsspec.filesystem("memory").pipe(f"/bucket/set/{name}", bytes(content))
    with pytest.raises(DataError, match=rf"{name}: its content is not what was packed"):
        shards.get_path(shards.parts["held_out"][0])
    assert not list((tmp_path / "cache").rglob("*-val*"))
    with pytest.raises(DataError, match=r"cannot be read"):
        read_shards("memory://bucket/other")
    with pytest.raises(DataError, match=r"cannot be read"):
        read_shards("nosuch://bucket/other")


def test_a_copy_that_another_process_deletes_is_made_again(remote, monkeypatch):
    shards = read_shards(remote)
    path = shards.get_path(shards.files[0])
    found, get_path = [], ShardSet.get_path

    def delete_after(self, file):
        found.append(get_path(self, file))
        if len(found) == 1:
            path.unlink()
        return found[-1]

    monkeypatch.setattr(ShardSet, "get_path", delete_after)
    dataset = ShardDataset(shards, "train", 3, lambda image: image)
    image, _, _ = dataset[Draw(0, 0)]
    assert image.shape[0] == 3
    assert len(found) == 2


def test_a_connection_that_breaks_is_one_line(remote, monkeypatch, tmp_path):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _):
            raise RuntimeError("lost")

    shards = read_shards(remote)
    monkeypatch.setattr("ecanet.data.shard_files.open_remote", lambda address: Broken())
    with pytest.raises(DataError, match=r"train-000000.tar: cannot be copied to .* \(lost\)$"):
        shards.get_path(shards.files[0])
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_the_oldest_copies_make_room(remote, monkeypatch):
    """A tenth of what the user may fill stays free; what the file system keeps for itself does not count."""
    shards = read_shards(remote)
    paths = [shards.get_path(file) for file in shards.parts["train"][:3]]
    for at, path in enumerate(paths):
        os.utime(path, (at, at))
    needed = shards.parts["train"][3].bytes

    def disk(_: object) -> Disk:
        left = sum(path.exists() for path in paths)
        free = needed + 12_500 - 1_000 * left
        return Disk(total=300_000, used=100_000 - free, free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    shards.get_path(shards.parts["train"][3])
    assert [path.exists() for path in paths] == [False, True, True]


# the order


@pytest.mark.parametrize("sizes", [[1], [3, 2], [7] * 5, [9, 1, 4, 4, 30, 2], [11] * 67, [0, 3]])
def test_an_epoch_takes_every_image_once(sizes):
    order = mix_shards(sizes, 5)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(order, mix_shards(sizes, 5))
    if sum(sizes) > 4:
        assert not np.array_equal(order, mix_shards(sizes, 6))


@pytest.mark.parametrize("world", [1, 2, 4, 8, 32])
def test_processes_read_shards_of_their_own(world):
    """Of 64 shards in 32 lanes, each of W processes reads 64 / W in an epoch, and no two read the same one."""
    sizes = [20] * 64
    read = []
    for rank in range(world):
        sampler = EpochSampler(
            sum(sizes), batch_size=1, seed=0, rank=rank, world=world, order=lambda seed: mix_shards(sizes, seed)
        )
        epochs = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            epochs.append({draw.image // 20 for draw in sampler})
        assert epochs[0] == epochs[1], "the copies on this machine's disk serve every epoch"
        read.append(epochs[0])
    assert [len(shards) for shards in read] == [64 // world] * world
    assert Counter(shard for shards in read for shard in shards) == Counter(range(64))


def test_shards_of_other_sizes_stay_with_their_processes():
    """Beside its share, a process reads at most the two shards that the edges of its lane cut."""
    random = np.random.default_rng(0)
    sizes = random.integers(20, 60, 200).tolist()
    shard_of = np.repeat(np.arange(200), sizes)
    lanes = [set(shard_of[at : at + sum(sizes) // 32 + 2].tolist()) for at in range(0, sum(sizes), sum(sizes) // 32)]
    for rank in range(32):
        read = {int(shard) for seed in range(4) for shard in shard_of[mix_shards(sizes, seed)[rank::32]]}
        assert len(read) <= max(map(len, lanes)) + 1


def test_few_shards_are_open_at_a_time():
    sizes = [50] * 256
    order = mix_shards(sizes, 0) // 50
    for at in range(0, len(order), 1_000):
        assert len(set(order[at : at + 1_000].tolist())) <= 2 * 2 * 32
    lane = order[::32]
    assert len(set(lane[:100].tolist())) == 2


def test_neighbours_are_mixed():
    order = mix_shards([100] * 4, 3)
    lane = order[::4]
    assert (np.abs(np.diff(lane)) != 1).mean() > 0.9
