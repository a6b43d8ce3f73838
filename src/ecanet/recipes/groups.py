"""The groups of a recipe's settings: data, network, detector, optimizer, schedule and checkpoints."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from ecanet.errors import ConfigError
from ecanet.recipes.checks import Config, Limits, check_options

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DetectorConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "has_photographs",
]


def has_photographs(name: str) -> bool:
    """Return whether the data set ``name`` is one of photographs of any size, for classification."""
    return name.startswith(("folder:", "shards:"))


LARGEST_SIDE, LARGEST_BATCH = 4096, 2**28
"""Pixels of an image's side, and of a batch: 4,096 images of 256 × 256, 3 GB as floating-point numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """The images of a run, their size, and their augmentation.

    Attributes:
        name: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``, ``folder:PATH`` or ``shards:ADDRESS``; for
            detection ``coco:PATH``, ``scenes`` or ``scenes:fashion-mnist``.
        root: the directory of the files, for names without a PATH.
        image_size: side in pixels. None leaves small images as they are and crops photographs to 224.
        batch_size: images per device and step.
        workers: worker processes that read images; None lets the data set choose.
        crop_padding: largest random shift of small images, in pixels.
        flip: whether images are mirrored at random. None mirrors photographs only.
        random_augment: magnitude of RandAugment, 0 for none.
        eval_crop: side of the evaluation crop, as a share of the image's short side.
        interpolation: how photographs are resized. None is what the library of the network says, else "bilinear".
        val_share: share of a flat folder's images (``folder:PATH`` with PATH/CLASS/…) that is held out; None is 0.2.
        sampler: "shuffle" draws each training image once in an epoch, "balanced" as many of every class.
        on_corrupt: "error" ends the run at an unreadable image, "skip" names the image and continues.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int | None = None
    batch_size: int = 128
    workers: int | None = None
    crop_padding: int = 0
    flip: bool | None = None
    random_augment: int = 0
    eval_crop: float = 0.875
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    val_share: float | None = None
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    on_corrupt: Literal["error", "skip"] = "error"

    LIMITS: ClassVar[Limits] = {
        "image_size": (1, LARGEST_SIDE),
        "batch_size": (1, 2**16),
        "workers": (0, 512),
        "crop_padding": (0, 256),
        "random_augment": (0, 30),
        "eval_crop": (0.1, 1),
    }

    def check(self) -> None:
        """Raise ConfigError if no image would be held out, or all of them, or if a batch is larger than any memory."""
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise ConfigError(f"val_share must be between 0 and 1, such as 0.2, got {self.val_share:g}")
        pixels = self.batch_size * (self.image_size or 1) ** 2
        if pixels > LARGEST_BATCH:
            raise ConfigError(
                f"batch_size={self.batch_size} and image_size={self.image_size} are {pixels:,} pixels at once, at most "
                f"{LARGEST_BATCH:,} are allowed; lower one of them"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """The network of a run, with its attention and its first weights: see ``ecanet.networks.build``.

    Attributes:
        name: ``resnet50``, ``timm:NAME``, ``torchvision:NAME`` or ``FILE.py:FACTORY``.
        attention: built into this library's networks, attached to others; "none" is the plain network.
        kernel_sizes: ECA's, as for ``ecanet.attach``.
        where: which modules get gates, as for ``ecanet.attach``. None leaves the choice to it.
        replace: "se" or "eca" puts the gates in the place of such modules of another library's network.
        preserve: True begins with neutral gates, False with gates as initialised; None is neutral wherever there are
            weights to preserve.
        weights: None (random), "default" (the library's own), or the path of a checkpoint.
        options: the attention's own.
    """

    name: str = "resnet20"
    attention: str = "eca"
    kernel_sizes: str | int | tuple[int, ...] = "adaptive"
    where: str | None = None
    replace: Literal["se", "eca"] | None = None
    preserve: bool | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    LIMITS: ClassVar[Limits] = {"kernel_sizes": (1, 1023), "attention": (None, 255), "where": (None, 1024)}

    def check(self) -> None:
        """Raise ConfigError if ``weights`` are spelled as in `ecanet.create_model`, or options are the network's."""
        check_options(self.options)
        if self.weights == "torchvision":
            raise ConfigError("weights 'torchvision' are called 'default' in a recipe; a path names a checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig(Config):
    """The arguments of ``create_detector`` that `ModelConfig` does not have. ``ModelConfig.name`` is the detector's.

    The short side of an image is resized to ``data.image_size``; in training, to that size or to one of ``scales``,
    chosen at random.
    """

    backbone: str = "resnet50"
    norm: Literal["eval", "frozen", "train"] = "eval"
    frozen_stages: int = 1
    freeze_attention: bool = False
    small: bool = False
    scales: tuple[int, ...] = ()

    LIMITS: ClassVar[Limits] = {"frozen_stages": (0, 5), "scales": (1, LARGEST_SIDE), "backbone": (None, 255)}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Config):
    """The optimizer. ``learning_rate`` is for ``base_batch`` images per step, and scales with the effective batch.

    ``decay_norms=False`` applies no weight decay to biases and normalization layers. Gates learn at ``gate_rate`` times
    the rate; where that is not 1, they have no weight decay.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    gate_rate: float = 1
    base_batch: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True

    LIMITS: ClassVar[Limits] = {
        "learning_rate": (0, None),
        "gate_rate": (0, None),
        "base_batch": (1, None),
        "momentum": (0, 1),
        "weight_decay": (0, None),
    }

    def check(self) -> None:
        """Raise ConfigError if Nesterov momentum has no momentum."""
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Config):
    """The learning rate schedule, after a linear warm-up of ``warmup_epochs`` or ``warmup_steps``.

    A warm-up in steps takes at most a quarter of the run.

    ``cosine`` ends at 0. ``step`` multiplies by ``factor`` every ``step_epochs`` epochs or, if there are
    ``milestones``, after each of these epochs. ``exponential`` multiplies by ``factor`` every epoch.
    """

    name: Literal["constant", "cosine", "step", "exponential"] = "cosine"
    warmup_epochs: float = 0
    warmup_steps: int = 0
    step_epochs: int = 30
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    LIMITS: ClassVar[Limits] = {
        "warmup_epochs": (0, None),
        "warmup_steps": (0, None),
        "step_epochs": (1, None),
        "factor": (0, 1),
    }

    def in_epochs(self, steps: int, epochs: int) -> Self:
        """Return this schedule with its warm-up in epochs, for a run of ``epochs`` epochs of ``steps`` steps each.

        >>> ScheduleConfig(warmup_steps=10).in_epochs(steps=4, epochs=100).warmup_epochs
        2.5
        """
        if not self.warmup_steps:
            return self
        return self.but(warmup_epochs=min(self.warmup_steps / steps, epochs / 4), warmup_steps=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Config):
    """How often a run saves its state within an epoch, beside the end of each epoch.

    A checkpoint is written when the last one is ``minutes`` old, and after every ``steps`` steps; 0 is never.
    """

    minutes: float = 15
    steps: int = 0

    LIMITS: ClassVar[Limits] = {"minutes": (0, None), "steps": (0, None)}
