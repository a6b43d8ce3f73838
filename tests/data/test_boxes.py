"""Annotated images in COCO's layout: targets, batches, and the messages for broken files."""

import json
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pycocotools import mask as coco_mask

from ecanet.data.annotations import read_annotations
from ecanet.data.boxes import DetectionDataset, flip_sample, load_boxes
from ecanet.data.coco import decode_mask, decode_run_lengths
from ecanet.data.samplers import GroupedBatchSampler
from ecanet.errors import ConfigError, DataError
from ecanet.recipes.groups import DataConfig
from ecanet.training.progress import quiet_lightning

SQUARE = [[2.0, 3.0, 7.0, 3.0, 7.0, 9.0, 2.0, 9.0]]


def annotation(number=1, image=1, category=7, box=(2.0, 3.0, 5.0, 6.0), segmentation=SQUARE, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": 30.0,
        "iscrowd": 0,
        "segmentation": segmentation,
        **more,
    }


def folder(path, annotations, images=((1, 20, 12), (2, 10, 30))):
    """A COCO folder with pictures (id, width, height); both splits are the same."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i, width, height in images],
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}],
        "annotations": annotations,
    }
    for split in ("train2017", "val2017"):
        (path / split).mkdir(parents=True, exist_ok=True)
        for i, width, height in images:
            shades = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
            Image.fromarray(shades).save(path / split / f"{i}.png")
        (path / "annotations").mkdir(exist_ok=True)
        (path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return path


def read(path, **options):
    return read_annotations(path / "annotations" / "instances_val2017.json", path / "val2017", **options)


def test_a_target_holds_the_annotations_of_the_file(tmp_path):
    crowd = annotation(3, box=(0, 0, 20, 12), iscrowd=1, segmentation={"size": [12, 20], "counts": [0, 240]})
    found = read(folder(tmp_path, [annotation(), annotation(2, category=3, box=(0, 0, 4, 4)), crowd]))
    assert found.class_names == ("cat", "cup")
    image, target = DetectionDataset(found)[0, False]
    assert image.shape == (3, 12, 20)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 3, 7, 9], [0, 0, 4, 4]]
    # labels count from 1 in the order of the categories' ids, and the crowd is left out
    assert target["labels"].tolist() == [2, 1]
    expected = torch.zeros(12, 20, dtype=torch.uint8)
    expected[3:9, 2:7] = 1
    assert torch.equal(target["masks"][0], expected)
    # the evaluation has the crowd
    assert [a["iscrowd"] for a in found.to_coco().dataset["annotations"]] == [0, 0, 1]


def test_an_image_without_objects_has_an_empty_target(tmp_path):
    _, target = DetectionDataset(read(folder(tmp_path, [annotation()])))[1, True]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 30, 10)


def test_a_flip_moves_boxes_and_masks(tmp_path):
    data = DetectionDataset(read(folder(tmp_path, [annotation()])))
    image, target = data[0, False]
    flipped, moved = data[0, True]
    assert torch.equal(flipped, image.flip(-1))
    # 20 wide: the box from 2 to 7 is now from 13 to 18
    assert moved["boxes"].tolist() == [[13, 3, 18, 9]]
    rows, columns = moved["masks"][0].nonzero().unbind(1)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [13, 3, 18, 9]
    assert torch.equal(flip_sample(flipped, moved)[1]["boxes"], target["boxes"])


def test_targets_are_clipped_and_the_evaluation_keeps_the_original_boxes(tmp_path):
    hanging, outside = annotation(2, box=(15, -4, 10, 8)), annotation(3, box=(30, 2, 5, 5))
    path = folder(tmp_path, [annotation(), hanging, outside, annotation(4, box=(19.5, 2, 5, 5))])
    found = read(path)
    _, target = DetectionDataset(found)[0, False]
    assert target["boxes"].tolist() == [[2, 3, 7, 9], [15, 0, 20, 4]]
    assert len(target["labels"]) == len(target["masks"]) == 2
    assert found.count_clipped_away() == 2
    written = json.loads((path / "annotations" / "instances_val2017.json").read_text())["annotations"]
    assert found.to_coco().dataset["annotations"] == written


BROKEN = {
    "its image is not in the file": annotation(9, image=5),
    "unknown category 4": annotation(9, category=4),
    r"not four finite numbers": annotation(9, box=(1, 2, math.nan, 4)),
    r"box \[1, 2, 0, 4\] has no area": annotation(9, box=(1, 2, 0, 4)),
    "has no area": annotation(9, box=(1, 2, 3, -4)),
    "three points or more": annotation(9, segmentation=[[1.0, 2.0, 3.0, 4.0]]),
    "as x, y, x, y": annotation(9, segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]),
    "coordinates are not all finite": annotation(9, segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, math.inf]]),
    r"the coordinate 100000, far outside": annotation(9, segmentation=[[1.0, 2.0, 1e5, 4.0, 5.0, 6.0]]),
    r"the coordinate -1e\+08, far outside": annotation(9, segmentation=[[1.0, -1e8, 3.0, 4.0, 5.0, 6.0]]),
    "it has no mask": annotation(9, segmentation=[]),
    "which mask_rcnn needs for training": annotation(9, segmentation=None),
    r"the box \[1, 2, an integer of 1,329 bits, 4\] is not four": annotation(9, box=(1, 2, 10**400, 4)),
    "image is not in the file": annotation(9, image=[1]),
    r"mask's size is \[5, 5\]": annotation(9, segmentation={"size": [5, 5], "counts": [25]}),
    "sum to 250, not to its 240": annotation(9, segmentation={"size": [12, 20], "counts": [10, 240]}),
    "a polygon's outline is 60,000 pixels long": annotation(9, segmentation=[[150.0, 0.0, -150.0, 0.0] * 100]),
    "run lengths cannot be": annotation(9, segmentation={"size": [12, 20], "counts": "o" * 10**6}),
    "run lengths cannot be read": annotation(9, segmentation={"size": [12, 20], "counts": "Q"}),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_annotation_is_named_in_one_line(tmp_path, complaint):
    path = folder(tmp_path, [annotation(), BROKEN[complaint]])
    with pytest.raises(DataError, match=rf"annotation 9 of image \S+: .*{complaint}.*data.on_corrupt=skip") as error:
        read(path)
    assert "\n" not in str(error.value)
    # without it the rest stays
    found = read(path, skip=True)
    assert len(found.problems) == 1
    assert [len(p.objects) for p in found.pictures] == [1, 0]


def test_a_missing_image_is_named_or_skipped(tmp_path):
    path = folder(tmp_path, [annotation(), annotation(2, image=2, box=(1, 1, 2, 2))])
    (path / "val2017" / "2.png").unlink()
    with pytest.raises(DataError, match=r"image 2: .*2\.png is missing"):
        read(path)
    found = read(path, skip=True)
    assert [p.id for p in found.pictures] == [1]
    # one line for the image, and none for its annotations
    assert len(found.problems) == 1


IMAGE = {"id": 1, "file_name": "1.png", "width": 20, "height": 12}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no list called 'images'"),
        ('{"images": [{"id": 1}]}', "no 'file_name'"),
        (json.dumps({"images": [IMAGE | {"id": "1"}]}), "an id that is not an integer of 64 bits: '1'"),
        (json.dumps({"images": [IMAGE | {"id": 2**70}]}), "an id that is not an integer of 64 bits: '1180591620717411"),
        (json.dumps({"images": [IMAGE | {"width": None}]}), "a width that is not a number of pixels: 'None'"),
        (json.dumps({"images": [IMAGE | {"height": "90"}]}), "a height that is not a number of pixels: '90'"),
        (json.dumps({"images": [IMAGE | {"height": 90.5}]}), "a height that is not a number of pixels"),
        (json.dumps({"images": [IMAGE | {"width": 10**8}]}), "a width of 100000000 pixels; at most 65,536 are allowed"),
        (json.dumps({"images": [IMAGE | {"file_name": None}]}), "a file_name that is not a text"),
        (json.dumps({"images": [IMAGE], "categories": [{"id": "a", "name": "b"}]}), "an id that is not an integer"),
        (json.dumps({"images": [IMAGE], "categories": [{"id": 1, "name": "b" * 5000}]}), "a name of 5000 characters"),
        (json.dumps({"images": [IMAGE], "categories": [{"id": 1, "name": "a\0b"}]}), "with control characters"),
        (
            json.dumps({"images": [IMAGE], "categories": [{"id": 1, "name": "\ud800"}]}),
            "a name with control characters",
        ),
        (json.dumps({"images": [IMAGE], "categories": [{"id": 1, "name": ["a"]}]}), "a name that is not a text"),
        ("[" * 200_000 + "]" * 200_000, "lie too deep in one another"),
    ],
)
def test_a_file_in_another_format_is_refused(tmp_path, content, complaint):
    path = folder(tmp_path, [])
    (path / "annotations" / "instances_val2017.json").write_text(content)
    with pytest.raises(DataError, match=complaint):
        read(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png", "\ud800.png"])
def test_a_file_name_that_cannot_exist_is_a_missing_image(tmp_path, name):
    path = folder(tmp_path, [annotation()])
    file = path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is missing") as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_an_image_of_another_size_than_annotated_is_named(tmp_path):
    path = folder(tmp_path, [annotation()])
    Image.new("RGB", (5, 5)).save(path / "val2017" / "1.png")
    assert "5 × 5 pixels, its annotation says 20 × 12" in DetectionDataset(read(path))[0, False].message


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    random = np.random.default_rng(0)
    for side in (1, 7, 200):
        mask = (random.random((side, side + 3)) < 0.3).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        lengths = list(decode_run_lengths(text))
        runs = np.concatenate([np.full(n, value % 2, np.uint8) for value, n in enumerate(lengths)])
        assert np.array_equal(runs.reshape(mask.shape, order="F"), mask)
        assert np.array_equal(decode_mask({"size": list(mask.shape), "counts": text}, *mask.shape), mask)


def test_batches_have_one_orientation_and_depend_on_the_epoch(tmp_path):
    shapes = [(i, 20 if i % 2 else 10, 15) for i in range(1, 17)]
    wide = [width > height for _, width, height in shapes]

    def epoch(number, rank=0, world=1, flip=True):
        batches = GroupedBatchSampler(wide, 4, flip=flip, seed=3, rank=rank, world=world)
        batches.set_epoch(number)
        return list(batches)

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    for batch in epoch(0):
        assert len({wide[index] for index, _ in batch}) == 1
    indices = [index for batch in epoch(5) for index, _ in batch]
    assert sorted(indices) == list(range(16))
    assert {flip for batch in epoch(0) for _, flip in batch} == {True, False}
    assert not any(flip for batch in epoch(0, flip=False) for _, flip in batch)
    # two processes share the batches of one
    assert sorted(epoch(0, 0, 2) + epoch(0, 1, 2)) == sorted(epoch(0))


def test_a_coco_folder_becomes_batches(tmp_path, capsys):
    path = folder(tmp_path, [annotation(), BROKEN["unknown category 4"], annotation(5, box=(30, 2, 5, 5))])
    data = load_boxes(DataConfig(name=f"coco:{path}", batch_size=2, workers=0, on_corrupt="skip"))
    printed = capsys.readouterr().err.splitlines()
    assert sum("skipped: annotation 9" in line for line in printed) == 2
    assert sum(line.startswith("not trained on: 1 boxes") for line in printed) == 1
    assert len(data.train) == len(data.held_out) == 2
    images, targets, unreadable = next(iter(data.val_dataloader()))
    assert [tuple(image.shape) for image in images] == [(3, 12, 20), (3, 30, 10)]
    assert [len(target["labels"]) for target in targets] == [1, 0]
    assert unreadable == []


def test_without_masks_segmentations_are_ignored(tmp_path):
    bare = annotation(3)
    del bare["segmentation"], bare["iscrowd"], bare["area"]
    path = folder(tmp_path, [annotation(segmentation=[]), annotation(2, segmentation=[[1.0]]), bare])
    found = read(path, masks=False)
    assert found.problems == []
    _, target = DetectionDataset(found)[0, False]
    assert len(target["boxes"]) == 3
    assert "masks" not in target
    truth = found.to_coco().dataset["annotations"][2]
    assert (truth["iscrowd"], truth["area"]) == (0, 30)
    with pytest.raises(DataError, match="has no mask"):
        read(path)


def test_a_file_without_usable_annotations_is_refused(tmp_path):
    path = folder(tmp_path, [annotation(), annotation(2)])
    file = path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for each in content["annotations"]:
        each["category_id"] = 4
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="none of its 2 annotations can be used .*unknown category 4"):
        read(path, skip=True)


def test_sizes_may_be_floats(tmp_path):
    path = folder(tmp_path, [annotation()])
    file = path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"width": 20', '"width": 20.0'))
    assert DetectionDataset(read(path))[0, False][1]["masks"].shape == (1, 12, 20)


def test_images_too_thin_for_any_network_are_named(tmp_path):
    path = folder(tmp_path, [annotation(), annotation(2, image=2, box=(0, 0, 1, 1))], ((1, 20, 12), (2, 300, 2)))
    with pytest.raises(DataError, match=r"image 2: 300 × 2 pixels are too thin"):
        read(path)
    assert [p.id for p in read(path, skip=True).pictures] == [1]


@pytest.mark.parametrize(("orientation", "upright"), [(3, True), (6, True), (6, False)])
def test_photographs_are_turned_by_their_exif_orientation(tmp_path, orientation, upright):
    path = folder(tmp_path, [annotation()], ((1, 20, 12),))
    turned = Image.new("RGB", (20, 12))
    turned.putpixel((4, 5), (255, 255, 255))  # inside the box
    expected = np.asarray(turned)
    if upright:
        stored = turned.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    else:  # a file whose annotations are of the pixels as stored
        stored = turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path / "val2017" / "1.png", exif=exif)
    image, _ = DetectionDataset(read(path))[0, False]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"root": "elsewhere"}, "--data-dir elsewhere has no meaning"),
        ({"crop_padding": 4}, "data.crop_padding is for classification"),
        ({"random_augment": 9}, "data.random_augment is for classification"),
        ({"eval_crop": 0.5}, "data.eval_crop is for classification"),
        ({"interpolation": "bicubic"}, "data.interpolation is for classification"),
    ],
)
def test_settings_of_classification_are_refused(tmp_path, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_boxes(DataConfig(name=f"coco:{folder(tmp_path, [annotation()])}", **settings))


def test_images_with_broken_exif_are_read(tmp_path):
    path = folder(tmp_path, [annotation()], ((1, 20, 12),))
    picture = Image.open(path / "val2017" / "1.png")
    picture.save(path / "val2017" / "1.png", exif=b"Exif\x00\x00garbage!")
    image, _ = DetectionDataset(read(path))[0, False]
    assert image.shape == (3, 12, 20)


class Recorder(L.LightningModule):
    """A task that learns nothing and records the batches of each epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[tuple[int, list[list[float]]]]] = {}

    def training_step(self, batch, batch_idx):
        _, targets = batch
        seen = self.epochs.setdefault(self.current_epoch, [])
        seen += [(int(target["image_id"]), target["boxes"].tolist()) for target in targets]
        return 0 * self.weight

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_resumed_run_with_workers_sees_the_batches_of_its_epochs(tmp_path):
    shapes = [(i, 20 if i % 2 else 10, 15) for i in range(1, 13)]
    objects = [annotation(i, image=i, box=(1, 2, 3, 4), segmentation=[]) for i, _, _ in shapes]
    path = folder(tmp_path / "coco", objects, images=shapes)
    config = DataConfig(name=f"coco:{path}", batch_size=2, workers=1, flip=True)

    def train(epochs, name, checkpoint=None):
        recorder = Recorder()
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, num_sanity_val_steps=0, limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path / name, filename="last")],
        )  # fmt: skip
        data = load_boxes(config, seed=3, masks=False)
        with quiet_lightning():
            trainer.fit(recorder, data, ckpt_path=checkpoint)
        return recorder.epochs

    whole = train(2, "whole")
    assert sorted(number for number, _ in whole[0]) == list(range(1, 13))
    assert whole[0] != whole[1]
    assert train(1, "interrupted") == {0: whole[0]}
    assert train(2, "resumed", tmp_path / "interrupted" / "last.ckpt") == {1: whole[1]}
