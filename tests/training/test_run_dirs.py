"""One run trains in a folder at a time, and one command starts it or goes on."""

import json
import multiprocessing
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ecanet.errors import ConfigError
from ecanet.recipes import DataConfig, ModelConfig, Recipe, to_dict
from ecanet.training import run
from ecanet.training.run_dirs import HOLDER, choose_run_dir, lock_run_dir

TINY = Recipe(data=DataConfig(name="digits", batch_size=600), model=ModelConfig(name="resnet8"), epochs=1)


def hold_lock(folder, locked):
    with lock_run_dir(folder, new=False):
        locked.set()
        signal.pause()


@pytest.fixture
def other(tmp_path):
    """Return a process that trains in the folder ``run``: a copy of this one, which imports nothing again."""
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=hold_lock, args=(tmp_path / "run", locked))
    process.start()
    try:
        assert locked.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_folder_in_which_another_process_trains_is_refused(other, tmp_path):
    expected = rf"process {other.pid} on {socket.gethostname()} \(since .*\) trains there now"
    with pytest.raises(ConfigError, match=expected) as caught:
        run(TINY, folder=tmp_path / "run", device="cpu", quiet=True)
    assert "\n" not in str(caught.value)
    other.kill()  # whatever happens to the process, the lock goes with it
    other.join()
    assert (tmp_path / "run" / HOLDER).exists()
    run(TINY, folder=tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run" / HOLDER).exists()


def test_a_resumed_run_takes_the_lock(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(TINY)))
    with lock_run_dir(tmp_path, new=False), pytest.raises(ConfigError, match="trains there now"):
        run(TINY, folder=tmp_path, resume=True, device="cpu", quiet=True)


def test_of_two_new_runs_the_second_does_not_begin(tmp_path):
    """Both were started when the folder was still empty."""
    with lock_run_dir(tmp_path, new=True):
        (tmp_path / "recipe.json").touch()
    with pytest.raises(ConfigError, match="already holds a run"), lock_run_dir(tmp_path, new=True):
        pass
    with lock_run_dir(tmp_path, new=False):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


def test_threads_are_kept_out_too(tmp_path):
    def enter():
        with lock_run_dir(tmp_path, new=False):
            pass

    with lock_run_dir(tmp_path, new=False), ThreadPoolExecutor() as pool, pytest.raises(ConfigError, match="now"):
        pool.submit(enter).result()


def test_one_command_starts_and_goes_on(ecanet, tmp_path):
    command = ["train", "digits", "--model", "resnet8", "--batch-size", 600, "--epochs", 2, "--device", "cpu"]
    code, _, err = ecanet(*command, "--auto-resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "name the run's directory (--out)" in err
    command += ["--auto-resume", "--out", "run"]
    code, out, err = ecanet(*command)
    assert (code, err) == (0, "")
    assert "resumed" not in out
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "previous.ckpt").replace(checkpoints / "last.ckpt")  # as if it had been killed in its second epoch
    code, out, err = ecanet(*command)
    assert (code, err) == (0, "")
    assert "resumed after epoch 1" in out
    code, out, err = ecanet(*command)  # the run is finished
    assert (code, err) == (0, "")
    assert "report run/report.html" in out
    code, _, err = ecanet(*command, "--seed", 1)
    own = "go on with the run's own settings (ecanet train --resume run), or choose another folder"
    assert (code, err) == (2, f"ecanet: run holds another recipe: seed is 0 there and 1 here; {own}\n")
    code, _, err = ecanet("train", "--resume", "run", "--auto-resume")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(("done", "epochs", "fits"), [(0, 2, True), (1, 2, True), (2, 2, False), (2, 3, True)])
def test_a_finished_run_takes_no_other_learning_rate(tmp_path, done, epochs, fits):
    """Nothing would be trained with it, and the recipe beside the results would name it."""
    recipe = TINY.but(epochs=2)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    (tmp_path / "metrics.csv").write_text("epoch\n" + "1\n" * done)
    other = recipe.but(epochs=epochs, optimizer=recipe.optimizer.but(learning_rate=0.5))
    assert choose_run_dir(recipe, tmp_path, resume=True) == tmp_path
    if fits:
        assert choose_run_dir(other, tmp_path, resume=True) == tmp_path
    else:
        with pytest.raises(ConfigError, match="is finished, and another learning rate would change nothing"):
            choose_run_dir(other, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("data", "name"),
    [("folder:photos/", "photos"), ("folder:a/我的 照片", "我的_照片"), ("shards:s3://bucket/set/", "set"),
     ("coco:.", "boats"), ("folder:/", "finetune"), ("scenes:fashion-mnist", "finetune")],
)  # fmt: skip
def test_a_run_is_named_by_what_it_trains_on(data, name, tmp_path, monkeypatch):
    (tmp_path / "boats").mkdir()
    monkeypatch.chdir(tmp_path / "boats")
    run_dir = choose_run_dir(Recipe(name="finetune", data=DataConfig(name=data)), None, resume=False)
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}", run_dir.name)
