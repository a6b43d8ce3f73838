"""Sets of shards are packed whole, the same byte for byte, and are checked."""

import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecanet import data
from ecanet.data import read_shards
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig
from ecanet.shards import check, pack
from ecanet.shards import packing as packing_module

SHARD_BYTES = 6_000
"""Small enough for several shards of each part."""


@pytest.fixture
def photos(tmp_path):
    """Three classes of twelve photographs of different sizes."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for at in range(12):
            pixels = random.integers(0, 255, (5, 6, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((60 + at, 50 + label))
            image.save(tmp_path / "photos" / name / f"{at}.{'png' if at % 3 == 0 else 'jpg'}")
    return tmp_path / "photos"


def pack_quietly(photos, out, **options):
    return pack(photos, out, workers=1, shard_bytes=SHARD_BYTES, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_every_image_is_packed_once_as_it_is(photos, tmp_path):
    said = pack_quietly(photos, tmp_path / "out")
    assert said[-1].startswith(f"{tmp_path / 'out'}: 30 training and 6 held-out images of 3 classes in ")
    shards = read_shards(str(tmp_path / "out"))
    assert shards.class_names == ("cat", "dog", "owl")
    assert len(shards.parts["train"]) > 2
    found = []
    for line in (tmp_path / "out" / "sources.txt").read_text().splitlines():
        shard, key, name = line.split("\t")
        with tarfile.open(tmp_path / "out" / shard) as archive:
            suffix = Path(name).suffix
            assert archive.extractfile(f"{key}{suffix}").read() == (photos / name).read_bytes()
            label = int(archive.extractfile(f"{key}.cls").read())
        assert shards.class_names[label] == name.partition("/")[0]
        found.append(name)
    assert sorted(found) == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    assert check(str(tmp_path / "out"), images=True)[0].endswith("all 36 images are decoded")


def test_the_training_images_are_mixed(photos, tmp_path):
    """Shards with images of one class each would give batches of one class."""
    pack_quietly(photos, tmp_path / "out")
    labels = read_shards(str(tmp_path / "out")).get_records("train")["label"].tolist()
    assert sum(one != two for one, two in itertools.pairwise(labels)) >= 12


def test_the_split_is_that_of_the_folder(photos, tmp_path):
    """A run on the shards holds out the images that a run on the folder would hold out."""
    pack_quietly(photos, tmp_path / "out", val_share=0.34, seed=3)
    split = data.build(DataConfig(name=f"folder:{photos}", val_share=0.34), seed=3).split
    lines = [line.split("\t") for line in (tmp_path / "out" / "sources.txt").read_text().splitlines()]
    assert sorted(name for shard, _, name in lines if shard.startswith("val")) == sorted(split.held_out)


def test_large_images_are_made_smaller(photos, tmp_path):
    pack_quietly(photos, tmp_path / "out", size=51)
    heights = set()
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        for member in archive:
            if member.name.endswith(".cls"):
                continue
            with Image.open(archive.extractfile(member)) as image:
                assert min(image.size) <= 51
                heights.add((image.size[1], image.format))
    assert {(50, "PNG"), (50, "JPEG"), (51, "JPEG")} >= heights
    assert len(heights) > 1


@pytest.mark.slow
def test_the_same_bytes_from_several_processes(photos, tmp_path):
    pack_quietly(photos, tmp_path / "one")
    pack(photos, tmp_path / "two", workers=2, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("stops", [1, 3])
def test_a_stopped_packing_goes_on_to_the_same_bytes(photos, tmp_path, monkeypatch, stops):
    pack_quietly(photos, tmp_path / "whole")
    write, written = packing_module.write_shard, []

    def write_or_stop(path, *arguments, **options):
        if len(written) == stops:
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments, **options)

    monkeypatch.setattr(packing_module, "write_shard", write_or_stop)
    with pytest.raises(KeyboardInterrupt):
        pack_quietly(photos, tmp_path / "out")
    with pytest.raises(DataError, match=r"no set of shards"):
        read_shards(str(tmp_path / "out"))
    monkeypatch.setattr(
        packing_module, "write_shard", lambda path, *a, **o: written.append(path.name) or write(path, *a, **o)
    )
    pack_quietly(photos, tmp_path / "out")
    assert len(written) == len(set(written)), "a shard was packed twice"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_packing_goes_on_to_the_same_bytes(photos, tmp_path):
    pack_quietly(photos, tmp_path / "whole")
    code = (
        "import sys; from ecanet.shards import packing; old = packing.write_shard\n"
        "def slow(*a, **o):\n  import time; time.sleep(0.3); return old(*a, **o)\n"
        f"packing.write_shard = slow; packing.pack(sys.argv[1], sys.argv[2], workers=1, shard_bytes={SHARD_BYTES})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(photos), str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-000001.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "index.json").exists()
    pack_quietly(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_whole_set_is_left_alone_and_another_one_refused(photos, tmp_path):
    pack_quietly(photos, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert pack_quietly(photos, tmp_path / "out") == [f"{tmp_path / 'out'} is whole: 36 images are packed already"]
    with pytest.raises(ConfigError, match=r"holds another set: other photographs, or other settings"):
        pack_quietly(photos, tmp_path / "out", size=40)
    (photos / "cat" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"holds another set"):
        pack_quietly(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds letter.txt, and shards need a folder of their own"):
        pack_quietly(photos, tmp_path / "other")


def test_an_unreadable_image_stops_the_packing_or_is_left_out_and_named(photos, tmp_path):
    (photos / "dog" / "1.jpg").write_bytes((photos / "dog" / "1.jpg").read_bytes()[:200])
    with pytest.raises(DataError, match=r"dog/1.jpg: cannot be read as an image .*--on-corrupt skip"):
        pack_quietly(photos, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.part"))
    said = pack_quietly(photos, tmp_path / "out", on_corrupt="skip")
    assert sum(line.startswith("skipped: ") and "dog/1.jpg" in line for line in said) == 1
    assert sum(file.images for file in read_shards(str(tmp_path / "out")).files) == 35
    check(str(tmp_path / "out"), images=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"digest": 1, "made": 3}'])
def test_a_damaged_plan_is_one_line(photos, tmp_path, content):
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    (tmp_path / "out" / ".packing" / "plan.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan.json: damaged; delete .*out and pack again$"):
        pack_quietly(photos, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"file": {}}', b'{"file": 1, "records": [[1]]}'])
def test_a_damaged_note_of_a_shard_packs_it_again(photos, tmp_path, monkeypatch, content):
    pack_quietly(photos, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "_finish", lambda plan, out, written: [])
        pack_quietly(photos, tmp_path / "out")
    (tmp_path / "out" / ".packing" / "train-000001.tar.json").write_bytes(content)
    pack_quietly(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_one_line(photos, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"^{out}: shards cannot be written there \(.*\)$"):
            pack_quietly(photos, out)


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "a flipped bit":
        content[600] ^= 1
    elif kind == "cut short":
        content = content[:-2000]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("a flipped bit", r"another SHA-256"), ("cut short", r"bytes instead of"), ("gone", r"No such file")],
)
def test_a_damaged_shard_is_named(photos, tmp_path, kind, message):
    pack_quietly(photos, tmp_path / "out")
    path = tmp_path / "out" / "train-000001.tar"
    if kind == "gone":
        path.unlink()
    else:
        damage(path, kind)
    with pytest.raises(DataError, match=rf"1 of the shards' checks failed: .*train-000001.tar.*{message}"):
        check(str(tmp_path / "out"))


def test_records_that_do_not_fit_are_found(photos, tmp_path):
    """The digests are right, but an image has another label in the index than in its shard."""
    from ecanet.shards.writing import write_index

    pack_quietly(photos, tmp_path / "out")
    shards = read_shards(str(tmp_path / "out"))
    start, parts = 0, {}
    for part, files in shards.parts.items():
        parts[part] = []
        for file in files:
            records = np.array(shards.records[start : start + file.images])
            parts[part].append((file, records))
            start += file.images
    parts["train"][0][1]["label"][1] = (parts["train"][0][1]["label"][1] + 1) % 3
    write_index(tmp_path / "out", shards.class_names, parts, {})
    with pytest.raises(DataError, match=r"train-000000.tar: image 1: label \d instead of \d"):
        check(str(tmp_path / "out"))
