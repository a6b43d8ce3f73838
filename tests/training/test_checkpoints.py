"""A run's checkpoints survive damage, a full disk and a kill; what cannot be resumed exactly is refused."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from ecanet.errors import CheckpointError, ConfigError
from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.report import write_file
from ecanet.training import run
from ecanet.training.checkpoints import AtomicCheckpointIO, find_last_checkpoint

TINY = Recipe(data=DataConfig(name="digits", batch_size=600), model=ModelConfig(name="resnet8"), epochs=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of three epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(TINY, folder=folder, device="cpu", quiet=True)
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def read_weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("damage", [truncate, change_a_bit])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(run_dir, damage, capsys):
    expected = read_weights(run_dir)
    damage(run_dir / "checkpoints" / "last.ckpt")
    report = run(TINY, folder=run_dir, resume=True, device="cpu")
    out, err = capsys.readouterr()
    assert "last.ckpt" in err
    assert err.rstrip().endswith("resuming from the checkpoint before it, previous.ckpt")
    assert "resumed after epoch 2" in out
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    assert all(torch.equal(value, expected[name]) for name, value in read_weights(run_dir).items())


@pytest.mark.parametrize("damage", [truncate, change_a_bit])
def test_without_a_whole_checkpoint_nothing_is_resumed(run_dir, damage):
    for name in ("last.ckpt", "previous.ckpt"):
        damage(run_dir / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="last.ckpt is (truncated|damaged)") as caught:
        run(TINY, folder=run_dir, resume=True, device="cpu")
    assert "\n" not in str(caught.value)


def test_finished_epochs_are_not_overwritten_where_their_checkpoint_is_gone(run_dir):
    for name in ("last.ckpt", "previous.ckpt"):
        (run_dir / "checkpoints" / name).unlink()
    before = (run_dir / "metrics.csv").read_bytes()
    with pytest.raises(CheckpointError, match=r"has finished epochs, but no checkpoints/last.ckpt"):
        run(TINY, folder=run_dir, resume=True, device="cpu")
    assert (run_dir / "metrics.csv").read_bytes() == before


def test_a_run_stopped_before_its_first_checkpoint_begins_again_and_says_so(run_dir, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    shutil.copy(run_dir / "recipe.json", tmp_path / "new")
    run(TINY, folder=tmp_path / "new", resume=True, device="cpu")
    assert "stopped before its first checkpoint: it begins again" in capsys.readouterr().out


@pytest.fixture
def small_files():
    """Let this process write no file of more than 100 kB, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before_it(tmp_path, small_files):
    io, path = AtomicCheckpointIO(), tmp_path / "run" / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        io.save_checkpoint({"step": step}, path)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*MB are free on the disk of .*--resume") as caught:
        io.save_checkpoint({"step": 3, "weights": torch.zeros(100_000)}, path)
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    found = find_last_checkpoint(tmp_path / "run")
    assert found == path
    assert io.load_checkpoint(found) == {"step": 2}


def test_a_full_disk_keeps_the_file_before_it(tmp_path, small_files):
    write_file(tmp_path / "report.html", "old")
    with pytest.raises(ConfigError, match=r"report.html: cannot be written \(File too large\); .* MB are free"):
        write_file(tmp_path / "report.html", "new" * 100_000)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("write", ["a small file", "a checkpoint"])
def test_the_disk_has_a_file_before_its_name_is_changed(tmp_path, monkeypatch, write):
    steps = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def note_replace(old, new):
        steps.append((old, new))
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    path = tmp_path / "file"
    if write == "a checkpoint":
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    else:
        write_file(path, "content")
    written, (temporary, name), folder = steps
    assert (written, name, folder) == (temporary, path, tmp_path)
