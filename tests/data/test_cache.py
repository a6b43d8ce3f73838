"""A generated set is made once, and a half-written, damaged or differently made one is never used."""

import threading
import time

import numpy as np
import pytest

from ecanet.data.cache import keep_arrays
from ecanet.errors import DataError

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
LABELS = np.array([7, 1])


class Maker:
    """Make the two images, and count how often."""

    def __init__(self, images=IMAGES):
        self.images, self.calls = images, 0

    def __call__(self):
        self.calls += 1
        return self.images, LABELS


def kept(folder):
    (path,) = folder.glob("*.npz")
    return path


def test_a_set_is_made_once_and_read_afterwards(tmp_path):
    make = Maker()
    for _ in range(3):
        images, labels = keep_arrays("few", {"seed": 0}, make, tmp_path)
        assert np.array_equal(images.numpy(), IMAGES.transpose(0, 3, 1, 2))
        assert labels.tolist() == [7, 1]
    assert make.calls == 1
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".lock", ".npz")] == []


def test_different_ingredients_make_a_different_set(tmp_path):
    keep_arrays("few", {"seed": 0}, Maker(), tmp_path)
    for other in ({"seed": 1}, {"seed": 0, "version": 2}, {}):
        make = Maker(IMAGES + 1)
        images, _ = keep_arrays("few", other, make, tmp_path)
        assert make.calls == 1
        assert np.array_equal(images.numpy(), (IMAGES + 1).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, DataError("no fonts"), MemoryError])
def test_an_interrupted_build_leaves_nothing(tmp_path, fault):
    def stop():
        raise fault

    with pytest.raises(fault if isinstance(fault, type) else DataError):
        keep_arrays("few", {}, stop, tmp_path)
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_an_interrupted_writing_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    """SIGKILL runs no cleanup: the temporary file stays, is not read, and goes with the next build."""
    real = np.savez

    def die(file, **arrays):
        real(file, **arrays)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", die)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            keep_arrays("few", {}, Maker(), tmp_path)
    assert len(list(tmp_path.glob(".few*.part"))) == 1
    make = Maker()
    keep_arrays("few", {}, make, tmp_path)
    assert make.calls == 1
    assert not list(tmp_path.glob(".few*.part"))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def swap_labels(path):
    with np.load(path) as file:
        np.savez(path, images=file["images"], labels=file["labels"][::-1], digest=file["digest"])


def drop_digest(path):
    np.savez(path, images=IMAGES, labels=LABELS)


@pytest.mark.parametrize("damage", [halve, empty, swap_labels, drop_digest])
def test_a_damaged_set_is_made_again(tmp_path, damage):
    keep_arrays("few", {}, Maker(), tmp_path)
    damage(kept(tmp_path))
    make = Maker()
    assert keep_arrays("few", {}, make, tmp_path)[1].tolist() == [7, 1]
    assert make.calls == 1


def test_two_runs_that_start_together_make_the_set_once(tmp_path):
    make = Maker()

    def make_slowly():
        time.sleep(0.1)
        return make()

    threads = [threading.Thread(target=keep_arrays, args=("few", {}, make_slowly, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"few cannot be written .*; give another folder with --data-dir") as caught:
        keep_arrays("few", {}, Maker(), tmp_path / "file" / "below")
    assert "\n" not in str(caught.value)
