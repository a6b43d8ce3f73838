"""Layouts of folders of photographs, and what is ignored there."""

from types import SimpleNamespace

import pytest

from ecanet import data
from ecanet.data import Split
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig
from photographs import flat, make_flat, paint, paths

# layouts


@pytest.mark.parametrize(
    ("training", "held_out"), [("train", "validation"), ("training", "valid"), ("Train", "Val"), ("train", "test")]
)
def test_other_names_of_the_parts(tmp_path, training, held_out):
    make_flat(tmp_path / training, {"a": 3, "b": 2})
    make_flat(tmp_path / held_out, {"a": 1, "b": 2})
    module = flat(tmp_path)
    assert (len(module.train), len(module.held_out), module.split) == (5, 3, None)


def test_test_is_held_out_only_where_there_is_nothing_else(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 5)):
        make_flat(tmp_path / part, {"a": count, "b": count})
    assert len(flat(tmp_path).held_out) == 4
    make_flat(tmp_path / "validation", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="val/ and validation/ could both be meant; rename or move one"):
        flat(tmp_path)


def test_a_class_called_train_is_one_line(tmp_path):
    for name in ("train", "test", "Validation"):
        make_flat(tmp_path / name / "vehicles", {"plane": 3, name: 3})
        with pytest.raises(DataError, match=f"vehicles/{name}: images, but no class folders; if '{name}' is a class"):
            flat(tmp_path / name / "vehicles")


def test_a_share_for_a_folder_with_held_out_images_is_refused(tmp_path):
    for part in ("train", "val"):
        make_flat(tmp_path / part, {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"val_share \(0.2\) is for a folder without held-out images; .* has val/"):
        flat(tmp_path, val_share=0.2)
    with pytest.raises(DataError, match="val_share is for folder:PATH; digits has held-out images of its own"):
        data.build(DataConfig(name="digits", val_share=0.1))
    with pytest.raises(DataError, match="now has train/ and val/, but the run has split"):
        flat(tmp_path, split=Split(train=("a/1.png",), held_out=("a/2.png",)), train=False)
    with pytest.raises(ConfigError, match="data.val_share is for classification"):
        data.build(DataConfig(name="scenes", val_share=0.1))


def test_no_classes_and_one_class(tmp_path):
    paint(tmp_path / "1.png")
    with pytest.raises(DataError, match="no class folders; put the images of each class into a folder"):
        flat(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in its class folders"):
        flat(tmp_path)
    make_flat(tmp_path / "photos", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=f"only one class .photos.; .*did you mean folder:{tmp_path / 'photos'}?"):
        flat(tmp_path)


# files


def test_what_is_ignored_is_counted_and_named(tmp_path):
    make_flat(tmp_path, {"a": 2, "b": 2})
    for name in (
        "a/notes.txt",
        "b/film.mov",
        "labels.csv",
        "b/deep/x.json",
        ".hidden/1.png",
        "a/._0.png",
        "a/.DS_Store",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "new").mkdir()
    paint(tmp_path / "stray.png")
    for name in ("recipe.json", "environment.json"):
        (tmp_path / "runs" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "one" / name).touch()
    paint(tmp_path / "runs" / "one" / "examples" / "0.png")
    module = flat(tmp_path)
    assert len(module.train) + len(module.held_out) == 4
    [line] = module.notices
    assert line == (
        "ignored 4 files that are no images: a/notes.txt, b/deep/x.json, b/film.mov, …; "
        "2 hidden files and folders: .hidden/, a/._0.png; 1 folder without files: new/; "
        f"1 image outside the class folders: stray.png; 1 folder of a run: runs/one/ (in {tmp_path})"
    )


def test_ignored_files_of_both_parts_and_folders_beside_them(tmp_path):
    for part in ("train", "val", "test"):
        make_flat(tmp_path / part, {"a": 2, "b": 2})
        (tmp_path / part / "a" / "x.txt").touch()
    (tmp_path / "raw\nfiles").mkdir()
    [line] = flat(tmp_path).notices
    assert line == (
        "ignored 2 files that are no images: train/a/x.txt, val/a/x.txt; "
        rf"1 folder beside the training and held-out images: 'raw\nfiles/' (in {tmp_path})"
    )


def test_notices_are_printed_once_by_the_first_process(tmp_path, capsys):
    make_flat(tmp_path, {"a": 2, "b": 2, "B": 2})
    for first, expected in ((False, 0), (True, 1)):
        module = flat(tmp_path)
        module.trainer = SimpleNamespace(is_global_zero=first, strategy=SimpleNamespace(broadcast=lambda mine: mine))
        module.setup("fit")
        module.setup("validate")
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"two classes: 'B' and 'b' in {tmp_path} differ only by case or accents"] * expected


def test_names_suffixes_and_nested_folders(tmp_path):
    names = ["ä ö.JPG", "日本.PnG", "deep/er/1.jpeg", "'quoted'.webp", "two\nlines.png", "x.tar.gif", "8%.bmp"]
    for name in names:
        paint(tmp_path / "klaß" / name)
    make_flat(tmp_path, {"other": 7})
    module = flat(tmp_path)
    found = paths(module.train, tmp_path) | paths(module.held_out, tmp_path)
    assert {path for path in found if path.startswith("klaß")} == {f"klaß/{name}" for name in names}
    assert module.notices == []


def test_links_are_followed_and_a_file_counts_once(tmp_path):
    make_flat(tmp_path / "store", {"cats": 4})
    make_flat(tmp_path / "photos", {"dog": 4})
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "photos" / "dog" / "round").symlink_to(tmp_path / "photos" / "dog")
    (tmp_path / "photos" / "dog" / "again.png").symlink_to("0.png")
    (tmp_path / "photos" / "dog" / "9.png").hardlink_to(tmp_path / "photos" / "dog" / "1.png")
    module = flat(tmp_path / "photos")
    assert len(module.train) + len(module.held_out) == 8
    [line] = module.notices
    assert line.startswith("ignored 2 second names of images: dog/")
    (tmp_path / "photos" / "cat" / "dog.png").symlink_to(tmp_path / "photos" / "dog" / "2.png")
    with pytest.raises(DataError, match="are the same file; an image has one class, so remove one"):
        flat(tmp_path / "photos")


def test_a_link_to_nothing_and_an_empty_file_follow_on_corrupt(tmp_path):
    make_flat(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "0.png").write_bytes(b"")
    (tmp_path / "b" / "0.png").unlink()
    (tmp_path / "b" / "0.png").symlink_to("nowhere.png")
    module = flat(tmp_path, train=False, on_corrupt="skip")
    found = [module.on_before_batch_transfer(batch, 0) for batch in module.val_dataloader()]
    assert sum(len(images) for images, _ in found) == 6
    assert [message.partition(": ")[2] for message in sorted(module.skipped)] == [
        "cannot be read as an image (not an image)", "no such file"
    ]  # fmt: skip
