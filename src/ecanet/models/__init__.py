"""Networks with an attention slot in every block.

Read downward: `detection` (detectors over these networks), `factory` (`create_model`), `checkpoints` (reads other
people's files), `mobilenet`, `resnet` (the networks), `tail` (the end of a residual block), `placement` (attentions
that stand elsewhere), `slots` (which attention a block holds), `kernel_sizes` (the one table of the released sizes).
"""

from typing import TYPE_CHECKING

from ecanet.models.checkpoints import LoadReport, load_checkpoint, load_state_dict, read_file, renamed
from ecanet.models.factory import create_model, list_models
from ecanet.models.kernel_sizes import KernelSizes, find_release, resolve_kernel_sizes
from ecanet.models.resnet import LAYERS
from ecanet.models.tail import Stage, Twins, activated, is_gate, plain_relu

if TYPE_CHECKING:
    from ecanet.models.detection import DETECTORS, create_detector

__all__ = [
    "DETECTORS",
    "LAYERS",
    "KernelSizes",
    "LoadReport",
    "Stage",
    "Twins",
    "activated",
    "create_detector",
    "create_model",
    "find_release",
    "is_gate",
    "list_models",
    "load_checkpoint",
    "load_state_dict",
    "plain_relu",
    "read_file",
    "renamed",
    "resolve_kernel_sizes",
]


def __getattr__(name: str) -> object:
    if name in ("DETECTORS", "create_detector"):  # torchvision takes seconds to import, and only detectors need it
        from ecanet.models import detection

        return getattr(detection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
