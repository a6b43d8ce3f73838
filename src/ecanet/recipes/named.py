"""Named recipes: functions that return a frozen `Recipe`. The docstring has its cost and its accuracy.

`find` takes the name of a recipe or of a data set. A data set's name means the recipe for it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from ecanet.errors import ConfigError
from ecanet.recipes.checks import suggestion
from ecanet.recipes.config import Recipe
from ecanet.recipes.groups import DataConfig, DetectorConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from ecanet.recipes.json_files import read_json

__all__ = ["RECIPES", "find"]


def quickstart() -> Recipe:
    """Return the recipe to try first: digits, without a download, in under a minute on two cores; at least 97 %."""
    return Recipe(
        name="quickstart",
        data=DataConfig(name="digits", batch_size=64, crop_padding=1),
        model=ModelConfig(name="resnet20"),
        optimizer=OptimizerConfig(learning_rate=0.1, base_batch=64, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=2),
        epochs=12,
    )


def fashion() -> Recipe:
    """Return three epochs of Fashion-MNIST, 60,000 real images: some minutes on two cores; at least 91 %."""
    return Recipe(
        name="fashion",
        data=DataConfig(name="fashion-mnist", batch_size=128, flip=True),
        model=ModelConfig(name="resnet20"),
        optimizer=OptimizerConfig(learning_rate=0.1, base_batch=128, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=0.5),
        epochs=3,
    )


def glyphs() -> Recipe:
    """Return three epochs of glyphs: 15,000 letters and digits on photographs, minutes on one core.

    ``pip install 'ecanet[glyphs]'`` brings the typefaces and photographs.
    """
    return Recipe(
        name="glyphs",
        data=DataConfig(name="glyphs", batch_size=64),
        model=ModelConfig(name="resnet20"),
        optimizer=OptimizerConfig(learning_rate=0.05, base_batch=64, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=0.5),
        epochs=3,
    )


def garments() -> Recipe:
    """Return three epochs of garments: Fashion-MNIST in colour on photographs, `fashion`'s settings."""
    recipe = fashion()
    return recipe.but(name="garments", data=recipe.data.but(name="garments"))


def cifar() -> Recipe:
    """Return 200 epochs of CIFAR-10 with ECA-ResNet-20: about 15 minutes on a GPU.

    The recipe is the usual one for these networks (He et al., 2016), with a cosine schedule instead of its steps. The
    published accuracy of the plain ResNet-20 is 91.25 %.
    """
    return Recipe(
        name="cifar",
        data=DataConfig(name="cifar10", batch_size=128, crop_padding=4, flip=True),
        model=ModelConfig(name="resnet20"),
        optimizer=OptimizerConfig(learning_rate=0.1, base_batch=128, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=5),
        epochs=200,
    )


def imagenet() -> Recipe:
    """Return the paper's recipe for ResNets: 100 epochs of ImageNet at 224 pixels; 77.48 % for ECA-ResNet-50.

    It takes days on four GPUs of the paper's time.

    SGD, batch 256, learning rate 0.1 divided by 10 every 30 epochs, weight decay 1e-4 on everything, plain
    cross-entropy, no warm-up (paper, section 4.1, and the authors' script).
    """
    return Recipe(
        name="imagenet",
        data=DataConfig(name="folder:imagenet", batch_size=256, image_size=224),
        model=ModelConfig(name="resnet50"),
        optimizer=OptimizerConfig(learning_rate=0.1, base_batch=256, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(name="step", step_epochs=30, factor=0.1),
        epochs=100,
    )


def imagenet_mobilenet() -> Recipe:
    """Return the paper's recipe for MobileNetV2: 400 epochs of ImageNet at 224 pixels, batch 96; 72.56 % with ECA.

    SGD, learning rate 0.045 times 0.98 every epoch, weight decay 4e-5 (paper, section 4.1, and the authors' script).
    """
    return Recipe(
        name="imagenet_mobilenet",
        data=DataConfig(name="folder:imagenet", batch_size=96, image_size=224),
        model=ModelConfig(name="mobilenet_v2"),
        optimizer=OptimizerConfig(learning_rate=0.045, base_batch=96, momentum=0.9, weight_decay=4e-5),
        schedule=ScheduleConfig(name="exponential", factor=0.98),
        epochs=400,
    )


def imagenet_a3() -> Recipe:
    """Return 100 epochs of ImageNet at 160 pixels after A3 (Wightman et al., 2021).

    It needs half of the arithmetic of `imagenet`. BCE, RandAugment 6, mixup 0.1, cutmix 1, cosine with five epochs of
    warm-up. A3 itself uses LAMB, which torch does not have; this recipe uses AdamW. The published accuracy (78.1 %,
    plain ResNet-50 evaluated at 224 pixels) is therefore an orientation only: this variant has not been measured.
    """
    return Recipe(
        name="imagenet_a3",
        data=DataConfig(name="folder:imagenet", batch_size=256, image_size=160, random_augment=6, eval_crop=0.95),
        model=ModelConfig(name="resnet50"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-3, base_batch=1024, weight_decay=0.05, decay_norms=False
        ),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=5),
        epochs=100,
        loss="bce",
        mixup=0.1,
        cutmix=1.0,
        precision="bf16-mixed",
    )


def finetune() -> Recipe:
    """Return the recipe for your own photographs: a pretrained network with lossless gates, trained gently.

    It is chosen for ``folder:PATH`` and ``shards:PATH`` with fewer than 20,000 images; ``--weights none`` trains
    from scratch instead. The network begins with its library's ImageNet weights and gates that change nothing; the
    new head begins at zero. AdamW at a low rate with a warm-up of 20 steps, gates at ten times the rate, label
    smoothing 0.1, at least 60 steps whatever the size of the set. The epoch with the best held-out accuracy is kept
    in best.ckpt.
    """
    return Recipe(
        name="finetune",
        data=DataConfig(name="folder:photos", batch_size=16),
        model=ModelConfig(name="mobilenet_v2", weights="default"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=5e-4, gate_rate=10, base_batch=16, weight_decay=0.01, decay_norms=False
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=20),
        epochs=5,
        min_steps=60,
        label_smoothing=0.1,
    )


def coco_1x() -> Recipe:
    """Return the paper's recipe for COCO: 12 epochs, short side 800; days on four GPUs of its time.

    With ECA-ResNet-50 the paper reports box AP 38.0 (Faster R-CNN), 39.0 (Mask R-CNN) and 37.3 (RetinaNet). SGD,
    learning rate 0.01 for 8 images per step, divided by 10 after epochs 8 and 11, weight decay 1e-4, warm-up over
    about 500 steps. The backbone has torchvision's weights and gates that change nothing at first;
    ``--set model.weights=PATH`` takes another classification checkpoint. Stem and first stage are frozen. Broken
    annotations are skipped, and printed.
    """
    return Recipe(
        name="coco_1x",
        task="detection",
        data=DataConfig(name="coco:coco", batch_size=8, image_size=800, flip=True, on_corrupt="skip"),
        model=ModelConfig(name="faster_rcnn", weights="default"),
        detector=DetectorConfig(backbone="resnet50"),
        optimizer=OptimizerConfig(learning_rate=0.01, base_batch=8, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(name="step", milestones=(8, 11), factor=0.1, warmup_epochs=0.034),
        epochs=12,
    )


def coco_2x() -> Recipe:
    """Return `coco_1x` with 24 epochs, steps at 16 and 22, and short sides from 640 to 800; it is not in the paper."""
    recipe = coco_1x()
    return recipe.but(
        name="coco_2x",
        detector=recipe.detector.but(scales=(640, 672, 704, 736, 768)),
        schedule=recipe.schedule.but(milestones=(16, 22)),
        epochs=24,
    )


def scenes() -> Recipe:
    """Return the recipe to try detection with: a small Mask R-CNN from scratch on generated scenes.

    It downloads nothing and takes about 15 minutes on one core. It reaches box AP50 0.9 and mask AP50 0.85
    (docs/detection-results.md). ``--model faster_rcnn`` and ``--model retinanet`` train the other detectors.
    """
    return Recipe(
        name="scenes",
        task="detection",
        data=DataConfig(name="scenes", batch_size=16, image_size=128, workers=0),
        model=ModelConfig(name="mask_rcnn"),
        detector=DetectorConfig(backbone="resnet20", norm="train", frozen_stages=0, small=True),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, base_batch=16, weight_decay=0.01),
        schedule=ScheduleConfig(name="cosine", warmup_epochs=0.3),
        epochs=6,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        fashion,
        glyphs,
        garments,
        cifar,
        imagenet,
        imagenet_mobilenet,
        imagenet_a3,
        finetune,
        coco_1x,
        coco_2x,
        scenes,
    )
}

RECIPE_FOR_DATA = {
    "digits": quickstart,
    "fashion-mnist": fashion,
    "glyphs": glyphs,
    "glyphs:hard": glyphs,
    "garments": garments,
    "cifar10": cifar,
    "cifar100": cifar,
}

RECIPE_FOR_KIND = {"folder": imagenet, "shards": imagenet, "coco": coco_1x, "scenes": scenes}

SMALL_FOLDER = 20_000
"""Files in a folder of images from which on training from scratch is the default."""


def find(name: str, *, scratch: bool = False) -> Recipe:
    """Return the recipe ``name``, or the recipe for the data set ``name``.

    For ``folder:PATH`` and ``shards:PATH`` it is `finetune` if there are fewer than 20,000 images, unless ``scratch``
    asks for training from scratch, which is `imagenet`.

    >>> find("fashion-mnist") == find("fashion")
    True
    >>> find("folder:photos").data.name
    'folder:photos'

    Raises:
        ConfigError: there is no recipe and no data set of that name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name in RECIPE_FOR_DATA:
        recipe = RECIPE_FOR_DATA[name]()
        return recipe.but(data=recipe.data.but(name=name))
    kind, colon, place = name.partition(":")
    if colon and kind in RECIPE_FOR_KIND:
        recipe = RECIPE_FOR_KIND[kind]()
        is_small = {"folder": _is_small, "shards": _is_small_set}.get(kind)
        if is_small is not None and not scratch and is_small(Path(place).expanduser()):
            recipe = finetune()
        return recipe.but(data=recipe.data.but(name=name))
    names = [*RECIPES, *RECIPE_FOR_DATA, "folder:PATH", "shards:PATH", "coco:PATH"]
    raise ConfigError(f"no recipe or data called {name!r}; {suggestion(name, names)}")


def _is_small(folder: Path) -> bool:
    """Return whether ``folder`` exists and has fewer than `SMALL_FOLDER` files, with those in the folders below it."""
    count = 0
    for _, _, files in os.walk(folder):
        count += len(files)
        if count >= SMALL_FOLDER:
            return False
    return folder.is_dir()


def _is_small_set(folder: Path) -> bool:
    """Return whether ``folder`` holds a set of shards with fewer than `SMALL_FOLDER` images, by its index."""
    try:
        values = cast(dict[str, list[dict[str, int]]], read_json(folder / "index.json"))
        return sum(file["images"] for part in ("train", "held_out") for file in values[part]) < SMALL_FOLDER
    except (OSError, ValueError, KeyError, TypeError):  # it is elsewhere, large, or broken, which is said later
        return False
