"""Networks with an attention slot in every block.

Read downward: `examples` (small images for detectors), `detection` (detectors over these networks), `factory`
(`create_model`), `checkpoints` (loads other people's files), `matching` (finds a network's tensors in them), `files`
(reads them without running code), `pickles` (bounds what they may ask for), `mobilenet`, `resnet` (the networks),
`network` (timm's interface), `execution` (runs a residual block), `block` (what it is made of), `placement` (attentions
that stand elsewhere), `slots` (which attention a block holds), `kernel_sizes` (the one table of the released sizes),
`origin` (what a network was made from), `downloads` (the folder that keeps them).
"""

from typing import TYPE_CHECKING

from ecanet.models.block import DescribesItself, Layer, Parts, describe, gate_of, runnable_parts, tail_gate_of
from ecanet.models.checkpoints import LoadReport, load_checkpoint, load_state_dict, rename
from ecanet.models.downloads import get_cache_folder, quiet_loggers
from ecanet.models.examples import is_detector, small_example
from ecanet.models.execution import Stage, call, is_eager, is_pointwise, run
from ecanet.models.factory import create_model, get_torchvision_weights, list_models
from ecanet.models.files import read_file
from ecanet.models.kernel_sizes import KernelSizes, check_no_kernel_sizes, find_release, resolve_kernel_sizes
from ecanet.models.network import FeatureInfo, FeatureNetwork, Network
from ecanet.models.origin import forget_gates, get_origin, remember_gates
from ecanet.models.resnet import LAYERS

if TYPE_CHECKING:
    from ecanet.models.detection import DETECTORS, create_detector

__all__ = [
    "DETECTORS",
    "LAYERS",
    "DescribesItself",
    "FeatureInfo",
    "FeatureNetwork",
    "KernelSizes",
    "Layer",
    "LoadReport",
    "Network",
    "Parts",
    "Stage",
    "call",
    "check_no_kernel_sizes",
    "create_detector",
    "create_model",
    "describe",
    "find_release",
    "forget_gates",
    "gate_of",
    "get_cache_folder",
    "get_origin",
    "get_torchvision_weights",
    "is_detector",
    "is_eager",
    "is_pointwise",
    "list_models",
    "load_checkpoint",
    "load_state_dict",
    "quiet_loggers",
    "read_file",
    "remember_gates",
    "rename",
    "resolve_kernel_sizes",
    "run",
    "runnable_parts",
    "small_example",
    "tail_gate_of",
]


def __getattr__(name: str) -> object:
    if name in ("DETECTORS", "create_detector"):  # torchvision takes seconds to import, and only detectors need it
        from ecanet.models import detection

        return getattr(detection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
