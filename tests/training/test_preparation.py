"""A recipe is completed by what follows from its network."""

import pytest
import torch

from ecanet.networks import find
from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.training import complete, restore


def recipe(network: str, **data: object) -> Recipe:
    return Recipe(model=ModelConfig(name=network), data=DataConfig(**{"name": "folder:photos", **data}))


@pytest.mark.parametrize(
    ("network", "size", "interpolation"),
    [
        ("timm:resnet26d", 224, "bicubic"),
        ("timm:test_resnet", 160, "bilinear"),
        ("timm:mobilenetv3_large_100", 224, "bicubic"),
        ("torchvision:resnet18", 224, "bilinear"),
        ("torchvision:efficientnet_b0", 224, "bicubic"),
        ("resnet50", None, None),
    ],
)
def test_photographs_have_the_size_and_interpolation_of_the_network(network, size, interpolation):
    if network.startswith("timm:"):
        pytest.importorskip("timm")
    found = complete(recipe(network), trusted=True)
    assert (found.data.image_size, found.data.interpolation) == (size, interpolation)
    assert complete(found, trusted=False) == found
    own = complete(recipe(network, image_size=96, interpolation="nearest"), trusted=True)
    assert (own.data.image_size, own.data.interpolation) == (96, "nearest")


def test_small_images_keep_their_size():
    assert complete(recipe("torchvision:resnet18", name="digits"), trusted=True).data == DataConfig(name="digits")


def test_weights_without_a_run_see_images_as_their_library_says(tmp_path):
    pytest.importorskip("timm")
    torch.save(find("timm:test_efficientnet").state_dict(), tmp_path / "weights.pth")
    task = restore(tmp_path / "weights.pth", model=ModelConfig(name="timm:test_efficientnet", attention="none"))
    assert (task.spec.size, task.spec.crop, task.spec.interpolation) == (160, 0.95, "bicubic")
