"""Tar files of others are indexed, and an index that does not fit is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecanet.data import RECORD, hash_file, read_shards
from ecanet.errors import ConfigError, DataError
from ecanet.shards import check, index

NAMES = ("imagenet-train-0000.tar", "imagenet-train-0001.tar", "imagenet-validation-00.tar")


def draw_image(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def foreign(tmp_path):
    """Two training shards and a held-out one; images and labels stand in both orders, beside other members."""
    for at, name in enumerate(NAMES):
        members = [("./a/x1.cls", b"1\n"), ("./a/x1.json", b"{}"), ("./a/x1.jpg", draw_image(at))]
        members += [("b/x1.seg.png", b"not read"), ("b/x1.jpeg", draw_image(at + 9)), ("b/x1.cls", b"0")]
        write_tar(tmp_path / name, members)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Change the index in ``folder``, and keep the digest of the records right."""
    values = json.loads((folder / "index.json").read_text())
    records = np.fromfile(folder / "index.bin", RECORD)
    change(values, records)
    records.tofile(folder / "index.bin")
    values["records"]["bytes"], values["records"]["sha256"] = hash_file(folder / "index.bin")
    (folder / "index.json").write_text(json.dumps(values))


def test_tar_files_of_others_are_indexed(foreign):
    said = index(foreign, class_names=["owl", "cat"])
    assert said == [f"{foreign / 'index.json'}: 4 training and 2 held-out images of 2 classes in 3 shards"]
    shards = read_shards(str(foreign))
    assert shards.class_names == ("owl", "cat")
    assert shards.records["label"].tolist() == [1, 0] * 3
    for at, record in enumerate(shards.records):
        content = (foreign / NAMES[at // 2]).read_bytes()[int(record["offset"]) :][: int(record["bytes"])]
        assert content == draw_image(at // 2 + 9 * (at % 2))
    check(str(foreign), images=True)


def test_an_index_is_not_replaced(foreign):
    index(foreign, class_names=["owl", "cat"])
    with pytest.raises(ConfigError, match=r"index.json: there is an index already; to make another one, delete it"):
        index(foreign)
    assert read_shards(str(foreign)).class_names == ("owl", "cat")


def test_labels_are_their_own_names_where_there_are_none(foreign):
    index(foreign)
    assert read_shards(str(foreign)).class_names == ("0", "1")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.jpg", b"1")], r"x has no label \(x\.cls\)"),
        ([("x.jpg", b"1"), ("x.cls", b"one")], r"cannot be read as a shard"),
        ([("x.jpg", b"1"), ("x.cls", b"-1")], r"cannot be read as a shard"),
        ([("x.jpg", b"1"), ("x.cls", b"1" * 4000)], r"the label x\.cls has 4,000 bytes"),
        ([("x.jpg", b""), ("x.cls", b"1")], r"x\.jpg is empty"),
        ([("x.jpg", b"1"), ("x.png", b"1"), ("x.cls", b"1")], r"x has two images"),
        ([("x.jpg", b"1"), ("x.cls", b"1"), ("x.png", b"1")], r"x has two images"),
        ([("x.jpg", b"1"), ("x.cls", b"1"), ("x.cls", b"0")], r"x has two labels"),
        ([("x.jxl", b"1"), ("x.cls", b"1")], r"x has a label and no image that can be read"),
    ],
)
def test_a_shard_that_does_not_fit_is_named(foreign, members, message):
    write_tar(foreign / NAMES[1], members)
    with pytest.raises(DataError, match=rf"{NAMES[1]}: .*{message}") as caught:
        index(foreign)
    assert "\n" not in str(caught.value)


def test_other_files_and_names_are_refused(foreign):
    (foreign / NAMES[1]).write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=rf"{NAMES[1]}: cannot be read as a shard"):
        index(foreign)
    (foreign / NAMES[1]).rename(foreign / "part-1.tar")
    with pytest.raises(DataError, match=r"part-1.tar: its name says 0 of train, val and test; rename it"):
        index(foreign)
    (foreign / "part-1.tar").rename(foreign / "train 1.tar")
    write_tar(foreign / "train 1.tar", [("x.jpg", b"1"), ("x.cls", b"0")])
    with pytest.raises(DataError, match=r"train 1.tar: a shard's name has letters, digits, .* alone; rename it"):
        index(foreign)
    (foreign / "train 1.tar").unlink()
    with pytest.raises(ConfigError, match=r"1 class names for labels up to 1; give one for each label"):
        index(foreign, class_names=["one"])
    (foreign / NAMES[2]).unlink()
    with pytest.raises(DataError, match=r"no tar file with val or test in its name"):
        index(foreign)
    with pytest.raises(DataError, match=r"no tar file with train in its name"):
        index(foreign / "nowhere")


def set_value(path, value):
    """Return a change of the index that puts ``value`` at ``path``."""

    def change(values, records):
        *groups, last = path
        for group in groups:
            values = values[group]
        values[last] = value

    return change


def set_record(field, value):
    def change(values, records):
        records[field][3] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_value(["train", 0, "name"], "../secret.tar"),
        set_value(["train", 0, "name"], "/etc/passwd"),
        set_value(["train", 0, "images"], -1),
        set_value(["train", 0, "images"], 10**18),
        set_value(["train", 0, "images"], 3),
        set_value(["train", 0, "bytes"], 600),
        set_value(["train", 0, "more"], 1),
        set_value(["records", "name"], "other.bin"),
        set_value(["classes"], ["one"]),
        set_value(["classes"], [1, 2]),
        set_value(["classes"], "ab"),
        set_value(["format"], "ecanet shards 2"),
        set_value(["train"], {"a": 1}),
        set_record("label", 2),
        set_record("shard", 0),
        set_record("offset", 2**63),
        set_record("offset", 2**64 - 10),
        set_record("bytes", 2**40),
        set_record("bytes", 0),
    ],
)
def test_an_index_that_does_not_fit_is_one_line(foreign, change):
    index(foreign)
    rewrite(foreign, change)
    with pytest.raises(DataError, match=rf"^{foreign}/index.json: ") as caught:
        read_shards(str(foreign))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b"null"])
def test_an_index_that_is_none_is_one_line(foreign, content):
    index(foreign)
    (foreign / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{foreign}/index.json: not an index of shards") as caught:
        read_shards(str(foreign))
    assert "\n" not in str(caught.value)


def test_changed_records_are_found(foreign):
    index(foreign)
    content = bytearray((foreign / "index.bin").read_bytes())
    content[30] ^= 1
    (foreign / "index.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"index.bin: its content is not what was packed"):
        read_shards(str(foreign))
