"""What a run is: frozen values that check themselves, to and from plain dictionaries.

A setting that does not exist is an error that suggests the right one:

>>> from_dict(Recipe, {"data": {"batchsize": 4}})
Traceback (most recent call last):
    ...
ecanet.errors.ConfigError: data.batchsize is not a setting; did you mean 'batch_size'?
"""

import copy
import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from ecanet.errors import ConfigError

__all__ = [
    "DataConfig",
    "DetectorConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "ScheduleConfig",
    "from_dict",
    "parse_kernel_sizes",
    "suggestion",
    "to_dict",
    "with_settings",
]


T = TypeVar("T")


class _Checked:
    """A frozen dataclass whose fields are held to their annotations, and whose numbers are held to ``LIMITS``."""

    __slots__ = ()
    # field: (lowest, highest); None is no limit
    LIMITS: ClassVar[dict[str, tuple[float | None, float | None]]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (f.name for f in fields(self)):  # pyright: ignore[reportArgumentType]
            value = _fit(getattr(self, name), hints[name], name)
            _check_limits(name, value, *self.LIMITS.get(name, (None, None)))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError for settings that do not go together."""

    def but(self, **changes: Any) -> Self:
        """The same, with ``changes``."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Checked):
    """Which images, at which size, changed how.

    ``name`` is ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100`` or ``folder:PATH``, or for detection
    ``coco:PATH``, ``scenes`` or ``scenes:fashion-mnist``. ``root`` is where files lie
    that ``name`` does not locate. ``image_size=None`` keeps small sets as they are and crops photographs to 224.
    ``batch_size`` counts the images of one device and one step. ``crop_padding`` and ``flip`` shift and mirror small
    images; photographs are always cropped at random, and mirrored unless ``flip`` is false. ``random_augment`` is
    RandAugment's magnitude, 0 for none. ``eval_crop`` is the evaluation crop's share of the short side.
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
    on_corrupt: Literal["error", "skip"] = "error"

    LIMITS: ClassVar = {
        "image_size": (1, None),
        "batch_size": (1, None),
        "workers": (0, None),
        "crop_padding": (0, None),
        "random_augment": (0, 30),
        "eval_crop": (0.1, 1),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Checked):
    """What ``ecanet.create_model`` is called with; ``options`` go to the attention."""

    name: str = "resnet20"
    attention: str = "eca"
    kernel_sizes: str | int | tuple[int, ...] = "adaptive"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig(_Checked):
    """What ``create_detector`` is called with beside `ModelConfig`, whose ``name`` is then the detector's.

    An image's short side is resized to ``data.image_size``; while training, to that or one of ``scales`` by lot.
    """

    backbone: str = "resnet50"
    norm: Literal["eval", "frozen", "train"] = "eval"
    frozen_stages: int = 1
    freeze_attention: bool = False
    small: bool = False
    scales: tuple[int, ...] = ()

    LIMITS: ClassVar = {"frozen_stages": (0, None)}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(_Checked):
    """``learning_rate`` is meant for ``base_batch`` images a step and scaled in proportion to the batch in use.

    ``decay_norms=False`` spares biases and normalisation layers the weight decay.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    base_batch: int = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True

    LIMITS: ClassVar = {
        "learning_rate": (0, None),
        "base_batch": (1, None),
        "momentum": (0, 1),
        "weight_decay": (0, None),
    }

    def check(self) -> None:
        """Nesterov's step needs a momentum."""
        if self.nesterov and not self.momentum:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(_Checked):
    """How the learning rate goes down, after rising in a line over ``warmup_epochs``.

    ``cosine`` ends at 0; ``step`` multiplies by ``factor`` every ``step_epochs``, or after each of ``milestones`` if
    there are any; ``exponential`` every epoch.
    """

    name: Literal["constant", "cosine", "step", "exponential"] = "cosine"
    warmup_epochs: float = 0
    step_epochs: int = 30
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    LIMITS: ClassVar = {"warmup_epochs": (0, None), "step_epochs": (1, None), "factor": (0, 1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(_Checked):
    """Everything that decides a run's result; ``ecanet.train.run`` turns it into one.

    ``accumulate`` batches make one step. ``mixup`` and ``cutmix`` are the Beta distributions' parameters, 0 for none;
    with both, each batch gets one of them. ``loss="bce"`` asks of every class on its own whether it is there.
    ``ema_decay`` keeps a running mean of the weights, and evaluates that. ``detector`` is for the detection task, which
    has no use for ``loss``, smoothing and mixing.
    """

    name: str = "custom"
    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    epochs: int = 1
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    accumulate: int = 1
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0

    LIMITS: ClassVar = {
        "epochs": (1, None),
        "label_smoothing": (0, 1),
        "mixup": (0, None),
        "cutmix": (0, None),
        "ema_decay": (0, 1),
        "accumulate": (1, None),
        "seed": (0, 2**32 - 1),
    }

    @property
    def learns_masks(self) -> bool:
        """Whether the network cuts objects out."""
        return self.task == "detection" and self.model.name == "mask_rcnn"

    def check(self) -> None:
        """The warm-up must leave something to train."""
        if self.schedule.warmup_epochs >= self.epochs and self.schedule.warmup_epochs:
            raise ConfigError(
                f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be less than epochs ({self.epochs}); "
                f"set schedule.warmup_epochs={self.epochs / 5:g}, say"
            )


def from_dict(cls: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Build ``cls`` from plain ``values``; what they leave out keeps its default.

    Raises:
        ConfigError: a key is no setting, or a value does not fit; ``at`` goes before the key in the message.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at or 'a recipe'} must be a group of settings, got {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    given: dict[str, Any] = {}
    for key, value in values.items():
        here = f"{at}.{key}" if at else key
        if key not in names:
            raise ConfigError(f"{here} is not a setting; {suggestion(key, names)}")
        given[key] = from_dict(hints[key], value, here) if is_dataclass(hints[key]) else value
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{at}.{error}" if at else str(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of ``from_dict``: dictionaries, lists, strings, numbers, None, and nothing else.

    >>> from_dict(Recipe, to_dict(Recipe(epochs=3))) == Recipe(epochs=3)
    True
    """
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def with_settings(config: T, settings: Mapping[str, Any]) -> T:
    """``config`` with values changed by their dotted names.

    >>> with_settings(Recipe(), {"data.batch_size": 32, "epochs": 2}).data.batch_size
    32
    """
    values = to_dict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            if not isinstance(inner.get(group), dict):
                raise ConfigError(f"{name} is not a setting; {suggestion(group, list(inner))}")
            inner = inner[group]
        inner[last] = value
    return from_dict(type(config), values)


def parse_kernel_sizes(text: str) -> str | int | tuple[int, ...]:
    """``official``, ``adaptive``; ``3,5,5,7`` and ``3557`` as one integer per stage; ``5`` and ``11`` as one for all.

    >>> parse_kernel_sizes("adaptive"), parse_kernel_sizes("3557"), parse_kernel_sizes("3, 5, 5, 11")
    ('adaptive', (3, 5, 5, 7), (3, 5, 5, 11))
    >>> parse_kernel_sizes("11")
    11
    """
    if text in ("official", "adaptive"):
        return text
    if text.isdecimal() and len(text) <= 2:
        return int(text)
    parts = text.split(",") if "," in text else list(text)
    try:
        if not parts:
            raise ValueError
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ConfigError(
            f"kernel sizes {text!r} are not 'official', 'adaptive' or one number per stage, such as 3,5,5,7"
        ) from None


def suggestion(wrong: str, names: list[str]) -> str:
    """What an error message says about a name that does not exist: the nearest one, or all."""
    nearest = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(names)}"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    # a copy: what is done to the dictionary must not reach the frozen value
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def _fit(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotation ``hint`` has it (lists as tuples, 1 as 1.0), or a ConfigError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
            return tuple(value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        kind = get_origin(option) or option
        # bool is an int to Python, and never meant as one here
        if isinstance(kind, type) and isinstance(value, kind) and (type(value) is not bool or kind is bool):
            return value
    raise ConfigError(f"{name} must be {_spoken(options)}, got {value!r}")


def _spoken(options: tuple[Any, ...]) -> str:
    words = {
        int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a group of settings",
        tuple: "a list of whole numbers", type(None): "nothing",
    }  # fmt: skip
    parts: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            parts += [repr(choice) for choice in get_args(option)]
        else:
            parts.append(words.get(get_origin(option) or option, getattr(option, "__name__", str(option))))
    return " or ".join(parts)


def _check_limits(name: str, value: Any, lowest: float | None, highest: float | None) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if lowest is not None and not value >= lowest:
        raise ConfigError(f"{name} must be at least {lowest:g}, got {value:g}")
    if highest is not None and not value <= highest:
        raise ConfigError(f"{name} must be at most {highest:g}, got {value:g}")
