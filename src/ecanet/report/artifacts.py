"""What a run keeps beside its numbers, so that the report can show it."""

from typing import TypedDict

from torch import Tensor

__all__ = ["Artifacts", "DetectionExample", "Example", "GateSummary"]


class Example(TypedDict):
    """A classified image, uint8 (1 or 3, H, W), with the indices of its class and of the predicted one."""

    image: Tensor
    label: int
    prediction: int
    probability: float


class DetectionExample(TypedDict):
    """An image, uint8 (3, H, W), with the objects that a detector found and those that are there.

    ``found`` has ``boxes``, ``labels``, ``scores`` and perhaps ``masks``, as torchvision's detectors return them, and
    ``truth`` has ``boxes`` and ``labels``. ``right`` says whether they agree.
    """

    image: Tensor
    right: bool
    found: dict[str, Tensor]
    truth: dict[str, Tensor]


class GateSummary(TypedDict):
    """What a gate did on held-out images: the mean weight of each channel and its standard deviation between images.

    ``alarms`` are sentences about what looks wrong.
    """

    name: str
    mean: list[float]
    deviation: list[float]
    alarms: list[str]


class Artifacts(TypedDict, total=False):
    """The results of a run that the report draws; each is drawn if it is there.

    ``confusion`` counts images by true class (row) and predicted class (column). ``precision_recall`` has the
    precisions at recall 0, 0.01, …, 1, by name ("boxes", "masks").
    """

    class_names: list[str]
    confusion: list[list[int]] | None
    examples: list[Example]
    precision_recall: dict[str, list[float]]
    detections: list[DetectionExample]
    gates: list[GateSummary]
