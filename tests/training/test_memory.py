"""The memory of `predict` and `detect` does not grow with the number of images."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from bounds import read_memory
from ecanet.data import DataSpec
from ecanet.data.coco import decode_mask
from ecanet.recipes import DataConfig, DetectorConfig, ModelConfig, Recipe
from ecanet.training import detect, detections, image_files, predict, tasks

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much it was")


def paint(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write one picture, and give it ``count`` names."""
    Image.effect_noise(size, 60).convert("RGB").save(folder / "0.bmp")
    for at in range(1, count):
        (folder / f"{at}.bmp").hardlink_to(folder / "0.bmp")
    return [folder / f"{at}.bmp" for at in range(count)]


def measure(use, files: list[Path]) -> int:
    """Return how many bytes of memory the call needs beyond what the process has before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = read_memory("VmRSS")
    assert sum(not isinstance(answer, Exception) for answer in use(files)) == len(files)
    return read_memory("VmHWM") - before


def make_classifier() -> tasks.Task:
    spec = DataSpec(class_names=("a", "b"), channels=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875)
    recipe = Recipe(data=DataConfig(name="folder:x"), model=ModelConfig(name="resnet8"))
    return tasks.build(recipe, spec)


def make_detector() -> tasks.Task:
    spec = DataSpec(class_names=("a", "b"), channels=3, size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    model, settings = ModelConfig(name="mask_rcnn"), DetectorConfig(small=True, backbone="resnet18", frozen_stages=0)
    recipe = Recipe(task="detection", data=DataConfig(name="scenes", image_size=64), model=model, detector=settings)
    return tasks.build(recipe, spec)


CASES = [("predict", 3, 24, (1500, 1000))] + [
    pytest.param(kind, 8, 64, (6000, 4000), marks=pytest.mark.slow) for kind in ("predict", "detect")
]


@pytest.mark.parametrize(("kind", "few", "many", "size"), CASES)
def test_memory_is_that_of_one_image(tmp_path, kind, few, many, size):
    torch.manual_seed(0)
    files = paint(tmp_path, many, size)
    task = make_classifier() if kind == "predict" else make_detector()

    def use(paths):
        yield from predict(task, paths) if kind == "predict" else detect(task, paths, tmp_path / "out", threshold=0.9)

    measure(use, files[:1])  # what is imported and allocated once
    small, large = measure(use, files[:few]), measure(use, files)
    print(f"{kind}: {few} images of {size[0]} x {size[1]} need {small / 1e6:.0f} MB, {many} need {large / 1e6:.0f} MB")
    assert large < small + 2 * 3 * size[0] * size[1]


def test_objects_in_a_shrunk_image_have_the_pixels_of_the_file(monkeypatch):
    found = {
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "boxes": torch.tensor([[10.0, 5, 30, 25]]),
        "masks": torch.zeros(1, 1, 50, 100),
    }
    found["masks"][..., 5:25, 10:30] = 1
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    monkeypatch.setattr(detections, "MOST_PIXELS", 5000)
    assert detections._shrink(image).shape == (3, 57, 86)
    (one,) = detections._list_objects(found, ["a", "b"], torch.Size([50, 100]), torch.Size([200, 300]))
    assert (one["name"], one["score"], one["box"]) == ("b", 0.75, [30, 20, 60, 80])
    mask = torch.as_tensor(decode_mask(one["mask"], 200, 300))
    assert mask.sum() == 60 * 80 == mask[20:100, 30:90].sum()


def test_images_behind_links_are_found_once(tmp_path):
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for name in ("store/a.jpg", "store/deep/b.HEIC", "store/c.txt", "photos/d.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "round").symlink_to(tmp_path / "photos")
    names = [path.relative_to(tmp_path / "photos").as_posix() for path in image_files(tmp_path / "photos")]
    assert names == ["d.png", "linked/a.jpg", "linked/deep/b.HEIC"]
