"""Scenes are a valid COCO folder, equal for equal seeds, and their held-out digits appear in no training scene."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ecanet.data.annotations import read_annotations
from ecanet.data.coco import decode_mask
from ecanet.data.scenes import MIN_VISIBLE, SceneConfig, _draw_scene, _load_sprites, _render_sprite, make_scenes
from ecanet.data.sources import SMALL_SETS
from ecanet.errors import ConfigError

FEW = SceneConfig(train=6, held_out=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_scenes(FEW, tmp_path_factory.mktemp("scenes"))


def content(folder, split="val2017"):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_scenes_are_a_valid_coco_folder(folder):
    for split, count in (("train2017", 6), ("val2017", 60)):
        found = read_annotations(folder / "annotations" / f"instances_{split}.json", folder / split)
        assert len(found.pictures) == count
        assert found.count_clipped_away() == 0
        assert found.class_names == tuple("0123456789")


def test_scenes_have_one_to_eight_objects_of_all_sizes(folder):
    annotations = content(folder)["annotations"]
    per_image = np.bincount([a["image_id"] for a in annotations], minlength=61)[1:]
    assert per_image.min() >= 1
    assert per_image.max() <= 8
    assert len(set(per_image)) >= 5
    areas = np.array([a["area"] for a in annotations])
    assert (areas < 32**2).any()
    assert ((areas > 32**2) & (areas < 96**2)).any()
    assert (areas > 96**2).any()


def test_boxes_enclose_their_masks_tightly_and_masks_do_not_overlap(folder):
    seen = {}
    for a in content(folder)["annotations"]:
        mask = decode_mask(a["segmentation"], 128, 128)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        x, y, width, height = a["bbox"]
        assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert a["area"] == mask.sum() == coco_mask.area(a["segmentation"])
        seen[a["image_id"]] = seen.get(a["image_id"], 0) + mask
    # the one in front hides the one behind
    assert all(count.max() == 1 for count in seen.values())


def test_objects_are_hidden_partly_but_never_too_much():
    sprites, labels = _load_sprites(FEW, train=False)
    hidden = 0
    for n in range(40):
        _, objects = _draw_scene(FEW, sprites, labels, np.random.default_rng(n))
        boxes = [np.argwhere(mask) for _, mask in objects]
        spans = [(at.min(0), at.max(0)) for at in boxes]
        hidden += any(
            (np.maximum(a[0], b[0]) <= np.minimum(a[1], b[1])).all() for i, a in enumerate(spans) for b in spans[:i]
        )
        # a digit's ink covers some tenth of its box at the very least
        assert all(len(at) >= MIN_VISIBLE * 0.1 * np.ptp(at, axis=0).prod() for at in boxes)
    assert hidden >= 10


def test_the_same_seed_makes_the_same_files(folder, tmp_path):
    again = make_scenes(FEW, tmp_path)
    other = make_scenes(SceneConfig(train=6, held_out=60, seed=1), tmp_path)
    assert content(again) == content(folder)
    assert content(other)["annotations"] != content(folder)["annotations"]
    first = [np.asarray(Image.open(p / "val2017" / "000000000001.png")) for p in (folder, again, other)]
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])
    assert first[0].shape == (128, 128, 3)


def test_existing_scenes_are_not_made_again(folder, monkeypatch):
    monkeypatch.setattr("ecanet.data.scenes._draw_scene", None)
    assert make_scenes(FEW, folder.parent) == folder


def test_scenes_of_another_edition_are_made_again(folder, monkeypatch):
    monkeypatch.setattr("ecanet.data.scenes.EDITION", 1)
    assert make_scenes(SceneConfig(train=1, held_out=1), folder.parent).name == "digits-128-1-1-8-0-1"


def test_rendered_sprites_are_legible_and_fill_the_canvas():
    """Half of full darkness is the edge, and a quarter where an object fills the canvas."""
    sprite = np.zeros((8, 8), dtype=np.uint8)
    sprite[1:7, 2:5] = [[102, 255, 102]]
    ink, mask = _render_sprite(sprite, 60, 1.0, 128)
    assert ink.shape == (60, 30)
    assert mask.any(0).sum() == 16  # where 0.4 + 0.06 (x - 5) > 0.5, from both sides
    ink, mask = _render_sprite(sprite, 60, None, 128)
    assert ink.shape == (60, 60)
    assert mask.all()
    assert not _render_sprite(sprite // 3, 60, 1.0, 128)[1].any()


def test_held_out_scenes_show_held_out_sprites():
    for train in (True, False):
        sprites, labels = _load_sprites(FEW, train=train)
        images, expected = SMALL_SETS["digits"].load(None, train)
        assert np.array_equal(sprites, images[:, 0].numpy())
        assert np.array_equal(labels, expected.numpy())
    held_out = {sprite.tobytes() for sprite in _load_sprites(FEW, train=False)[0]}
    assert not held_out & {sprite.tobytes() for sprite in _load_sprites(FEW, train=True)[0]}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"sprites": "cats"}, "digits or fashion-mnist"),
        ({"side": 20}, "side must be at least 64"),
        ({"most": 0}, "most"),
    ],
)
def test_invalid_settings_are_refused(wrong, complaint):
    with pytest.raises(ConfigError, match=complaint):
        SceneConfig(**wrong)
