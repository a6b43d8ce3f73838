"""A run on small images, evaluated on a folder of photographs: in the run's size, or refused for what does not fit."""

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from ecanet import training
from ecanet.data.sources import SMALL_SETS, DataSpec, SmallSet
from ecanet.errors import DataError
from tiny_runs import TINY, load_tiny, run

NAMES = ("dark", "grey", "light")


def load_coloured(root, training):
    images, labels = load_tiny(root, training)
    return images.expand(-1, 3, -1, -1).contiguous(), labels


def test_photographs_are_taken_in_the_run_s_size(tmp_path, monkeypatch):
    spec = DataSpec(class_names=NAMES, channels=3, size=8, mean=(0.4,) * 3, std=(0.3,) * 3)
    monkeypatch.setitem(SMALL_SETS, "tiny", SmallSet(load=load_coloured, spec=spec))
    run(TINY.but(epochs=1, model=TINY.model.but(name="resnet8")), tmp_path / "run", loggers="none")
    for folder, names in (("same", NAMES), ("other", ("cat", "dog"))):
        for level, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True)
            for at in range(5):
                picture = torch.full((3, 30, 40), 30 + 80 * level + at, dtype=torch.uint8)
                to_pil_image(picture).save(tmp_path / folder / name / f"{at}.png")
    recipe = training.restore(tmp_path / "run", data_name=f"folder:{tmp_path / 'same'}").recipe
    assert (recipe.data.image_size, recipe.data.crop_padding) == (8, 0)
    assert training.build_data(recipe, train=False).spec.size == 8
    assert training.restore(tmp_path / "run", data_name="tiny").recipe.data.crop_padding == 1
    with pytest.raises(DataError, match="has 2 classes and the network 3"):
        training.evaluate(tmp_path / "run", data_name=f"folder:{tmp_path / 'other'}", device="cpu")
    assert "top1" in training.evaluate(tmp_path / "run", data_name=f"folder:{tmp_path / 'same'}", device="cpu")
