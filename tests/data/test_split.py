"""The split of a flat folder: stratified, seeded, kept by its run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ecanet.data import Split
from ecanet.data.split import count_held_out, make_split, read_split
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig
from photographs import flat, make_flat, paint, paths

UNEVEN = {"ant": 2, "bee": 10, "Élan": 7, "zwei Wörter": 41}


# the split


def test_every_class_is_split_in_the_same_share(tmp_path):
    module = flat(make_flat(tmp_path, UNEVEN))
    train, held_out = paths(module.train, tmp_path), paths(module.held_out, tmp_path)
    assert module.spec.class_names == tuple(sorted(UNEVEN))
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == sum(UNEVEN.values())
    counts = {name: sum(path.startswith(f"{name}/") for path in held_out) for name in UNEVEN}
    assert counts == {"ant": 1, "bee": 2, "Élan": 1, "zwei Wörter": 8}
    for dataset in (module.train, module.held_out):
        assert all(Path(path).parent.name == module.spec.class_names[label] for path, label in dataset.samples)


@pytest.mark.parametrize("images", [2, 3, 9, 10, 333])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.2, 0.5, 0.999])
def test_each_part_of_a_class_has_an_image(images, share):
    count = count_held_out(images, share)
    assert 1 <= count <= images - 1
    assert count in (1, images - 1) or abs(count - share * images) <= 0.5


def test_the_share_is_a_setting(tmp_path):
    module = flat(make_flat(tmp_path, {"a": 10, "b": 30}), val_share=0.5)
    assert (len(module.train), len(module.held_out)) == (20, 20)
    for wrong in (0.0, 1.0, -0.2, 3):
        with pytest.raises(ConfigError, match=r"val_share must be between 0 and 1, such as 0\.2, got"):
            DataConfig(val_share=wrong)


def test_the_split_depends_on_the_seed_alone(tmp_path):
    make_flat(tmp_path, {"a": 30, "b": 30})
    one, again, other = (paths(flat(tmp_path, seed=seed).held_out, tmp_path) for seed in (3, 3, 4))
    assert one == again != other
    # It is a random choice, not the first files; and another class's files change nothing.
    assert one != {f"{name}/{at}.png" for name in "ab" for at in range(6)}
    make_flat(tmp_path, {"c": 5})
    assert {path for path in paths(flat(tmp_path, seed=3).held_out, tmp_path) if path[0] != "c"} == one
    names = {path.partition("/")[2] for path in one if path[0] == "a"}
    assert names != {path.partition("/")[2] for path in one if path[0] == "b"}


def test_a_class_of_one_image_is_one_line(tmp_path):
    make_flat(tmp_path, {"cat": 4, "dog": 1})
    with pytest.raises(DataError, match=r"dog: only one image, and a class needs one to train on and one to hold out"):
        flat(tmp_path)


def test_a_folder_that_is_too_large_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ecanet.data.split.LARGEST_SPLIT", 100)
    with pytest.raises(DataError, match=r"60 images are too many to split here; make .*/train/CLASS"):
        make_split({name: [f"{name}/{at}" for at in range(30)] for name in "ab"}, 0.2, seed=0, folder=tmp_path)


# a run's split


def test_a_run_keeps_its_split_when_files_come_and_go(tmp_path, capsys):
    make_flat(tmp_path, {"a": 10, "b": 10})
    first = flat(tmp_path)
    make_flat(tmp_path, {"a": 25, "c": 3})
    later = flat(tmp_path, split=first.split)
    assert later.train.samples == first.train.samples
    assert later.held_out.samples == first.held_out.samples
    assert later.spec.class_names == ("a", "b")
    [line] = later.notices
    assert line.startswith(f"not used: 18 images of {tmp_path} that the run's split does not have: a/10.png, a/11.png")
    evaluated = flat(tmp_path, split=first.split, train=False)
    assert evaluated.train is None
    assert evaluated.held_out.samples == first.held_out.samples


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_file_that_is_gone_is_named(tmp_path, part):
    split = flat(make_flat(tmp_path, {"a": 10, "b": 10})).split
    victim = getattr(split, part)[0]
    (tmp_path / victim).unlink()
    with pytest.raises(DataError, match=f"{tmp_path / victim}: in the run's split, but gone; put it back .a run cont"):
        flat(tmp_path, split=split)
    if part == "train":  # not needed to evaluate
        assert len(flat(tmp_path, split=split, train=False).held_out) == 4
    else:
        with pytest.raises(DataError, match=f"{victim}: in the run's split, but gone; put it back .--on-corrupt skip"):
            flat(tmp_path, split=split, train=False)
        assert len(flat(tmp_path, split=split, train=False, on_corrupt="skip").held_out) == 4


def test_another_folder_is_evaluated_without_training_images(tmp_path):
    split = flat(make_flat(tmp_path / "run", {"a": 10, "b": 10})).split
    elsewhere = Split(train=split.train, held_out=())
    # The same folder in another place: the held-out images, and those that are new.
    (tmp_path / "run").rename(tmp_path / "moved")
    paint(tmp_path / "moved" / "b" / "new.png")
    moved = flat(tmp_path / "moved", split=elsewhere, train=False)
    assert paths(moved.held_out, tmp_path / "moved") == {*split.held_out, "b/new.png"}
    assert moved.notices[0].startswith("not evaluated: 16 images")
    make_flat(tmp_path / "other", {"a": 3, "b": 2}, "jpg")
    other = flat(tmp_path / "other", split=elsewhere, train=False)
    assert (len(other.held_out), other.notices) == (5, [])
    for path in (tmp_path / "moved").rglob("*.png"):
        if path.relative_to(tmp_path / "moved").as_posix() not in split.train:
            path.unlink()
    with pytest.raises(DataError, match="every image has the path of one that the run was trained on"):
        flat(tmp_path / "moved", split=elsewhere, train=False)


def test_without_a_run_all_images_are_evaluated(tmp_path):
    assert len(flat(make_flat(tmp_path, {"a": 3, "b": 1}), train=False).held_out) == 4


def test_a_broken_split_file_is_one_line(tmp_path):
    assert read_split(tmp_path / "split.json") is None
    for text in ("", "[]", '{"train": []}', '{"train": [1], "held_out": []}', '{"train": 3, "held_out": []}'):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(DataError, match=r"split\.json: not the list of a run's images .*; restore it"):
            read_split(tmp_path / "split.json")


def test_processes_with_other_files_are_refused(tmp_path):
    make_flat(tmp_path, {"a": 20, "b": 20})
    sent: list[str] = []

    def broadcast(mine: str) -> str:
        """Return what the first process has sent, which is the first caller here."""
        sent.append(mine)
        return sent[0]

    def begin(seed: int) -> None:
        module = flat(tmp_path, seed=seed)
        module.trainer = SimpleNamespace(
            is_global_zero=not sent, global_rank=len(sent), strategy=SimpleNamespace(broadcast=broadcast)
        )
        module.setup("fit")

    begin(seed=1)
    begin(seed=1)
    with pytest.raises(DataError, match="process 2 found other images than process 0; every machine needs the same"):
        begin(seed=2)
