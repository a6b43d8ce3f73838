"""All settings of a run, as one frozen value that checks itself.

An unknown setting is an error that suggests the right one:

>>> Recipe(epoch=3)
Traceback (most recent call last):
    ...
ecanet.errors.ConfigError: epoch is not a setting of Recipe; did you mean 'epochs'?
"""

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import ClassVar, Literal, Self

from ecanet.errors import ConfigError, show_value
from ecanet.recipes.checks import Config, Limits
from ecanet.recipes.groups import (
    CheckpointConfig,
    DataConfig,
    DetectorConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Config):
    """All settings that decide the result of a run; ``ecanet.training.run`` trains it.

    Attributes:
        task: "classification" or "detection".
        detector: settings of the detection task. That task has its own losses: it takes no ``loss``,
            ``label_smoothing``, ``class_weights``, ``mixup`` or ``cutmix``.
        min_steps: with a small data set, the number of epochs grows until the optimizer takes this number of steps.
        loss: "bce" is binary cross-entropy, one independent decision per class.
        class_weights: how much an image counts in the loss, by its class: "balanced" is N / (K N_k) for N training
            images, N_k of them in this one of K classes, so that the mean is 1. Numbers are in the order of the class
            names. None is 1 for all.
        mixup, cutmix: parameter of the Beta distribution, 0 for none. With both, each batch gets one of them.
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated. None for no average.
        accumulate: number of batches per optimizer step.
        strategy: "ddp" gives every process all weights; "fsdp" shares weights, gradients and the optimizer's state
            among the processes, for networks that do not fit one GPU.
        sync_batchnorm: whether batch norms take their statistics over all processes; several GPUs only.
        channels_last: whether weights and images have the channels_last memory format.
        on_nan: "stop" ends the run at a loss that is not finite; "skip" names the batch's images and takes no step, for
            which a GPU waits for each step's loss.
        compile: whether the network is compiled by ``torch.compile``.
        cuda_graph: whether forward and backward of the network are captured as CUDA graphs; for classification on one
            GPU, with one batch a step.
        seed: random seed of the run.
    """

    name: str = "custom"
    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    epochs: int = 1
    min_steps: int = 0
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    accumulate: int = 1
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    on_nan: Literal["stop", "skip"] = "stop"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    sync_batchnorm: bool = False
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 0

    LIMITS: ClassVar[Limits] = {
        "name": (None, 200),
        "task": (None, 255),
        "epochs": (1, 10**6),
        "min_steps": (0, 10**9),
        "label_smoothing": (0, 1),
        "mixup": (0, 1000),
        "cutmix": (0, 1000),
        "ema_decay": (0, 1),
        "accumulate": (1, None),
        "seed": (0, 2**32 - 1),
    }

    @property
    def learns_masks(self) -> bool:
        """Return whether the network predicts masks."""
        return self.task == "detection" and self.model.name.startswith(("mask_rcnn", "torchvision:maskrcnn"))

    def but(self, **changes: object) -> Self:
        """Return a copy with ``changes``.

        If only ``epochs`` changes, a warm-up that is too long shrinks in proportion, and no least number of steps
        lengthens the run.

        >>> Recipe(epochs=10, schedule=ScheduleConfig(warmup_epochs=2)).but(epochs=1).schedule.warmup_epochs
        0.2

        Raises:
            ConfigError: as for the constructor.
        """
        if "epochs" in changes and "schedule" not in changes:
            changes["schedule"] = self.schedule.but(warmup_epochs=self.warmup_for(changes["epochs"]))
        if "epochs" in changes:
            changes.setdefault("min_steps", 0)
        return replace(self, **changes)

    def warmup_for(self, epochs: object) -> float:
        """Return the warm-up of this recipe when it trains for ``epochs`` epochs.

        It stays as it is while it is shorter than the run; otherwise it keeps its share of the run.
        """
        warmup = self.schedule.warmup_epochs
        if isinstance(epochs, Integral) and 0 < int(epochs) <= warmup:
            return warmup * int(epochs) / self.epochs
        return warmup

    def check(self) -> None:
        """Raise ConfigError if the name cannot be a folder's, or settings contradict each other."""
        if not self.name or {"/", "\\"} & set(self.name):
            raise ConfigError(f"name must be the name of a folder, without slashes, got {self.name!r}")
        weights = self.class_weights
        if isinstance(weights, tuple) and not (min(weights, default=-1) >= 0 and sum(weights) > 0):
            expected = "'balanced' or a number of at least 0 for each class, not all 0"
            raise ConfigError(f"class_weights must be {expected}, got {show_value(list(weights))}")
        for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if 0 < value < 1e-3:  # a Beta distribution's parameter would be rounded to 0
                raise ConfigError(f"{name} must be 0 or from 0.001 to 1000, got {value:g}")
        if weights == "balanced" and self.data.sampler == "balanced":
            raise ConfigError("class_weights=balanced and data.sampler=balanced would balance twice; leave one out")
        if self.cuda_graph:
            self._check_graph()
        if self.schedule.warmup_epochs and self.schedule.warmup_steps:
            raise ConfigError("give schedule.warmup_epochs or schedule.warmup_steps, not both: set one of them to 0")
        if self.schedule.warmup_epochs >= self.epochs and self.schedule.warmup_epochs:
            raise ConfigError(
                f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be less than epochs ({self.epochs}); "
                f"set for example schedule.warmup_epochs={self.epochs / 5:g}"
            )

    def _check_graph(self) -> None:
        """Raise ConfigError if a setting does not fit CUDA graphs."""
        if self.task == "detection":
            raise ConfigError("cuda_graph is for classification: images of a detector have many sizes; leave it out")
        if self.compile:
            raise ConfigError("compile=true and cuda_graph=true do not go together; leave one of them out")
        if self.accumulate > 1:
            # A graph writes the gradients of each batch into the same memory.
            raise ConfigError(
                f"cuda_graph=true takes one batch a step, got accumulate={self.accumulate}; leave one of them out"
            )
