"""Faster forms of whole networks.

Read downward: `fusion` (`fuse`: runs torchvision's and timm's blocks by their parts), `optimization` (`optimize`: makes
a copy for inference), `captured` (replays it as a CUDA graph), `comparison` (proves a plan for it), `changes` (carries
out a plan), `chains` (makes a plan from a run of the network), `folding` (folds norms into convolutions), `blocks`
(what the copies are made of), `copying` (copies a network for evaluation). What a block is made of, and how it is run,
is described in `ecanet.models`.
"""

from ecanet.inference.blocks import InferenceBlock
from ecanet.inference.copying import copy_for_evaluation, copy_model
from ecanet.inference.fusion import fuse
from ecanet.inference.optimization import Optimization, optimize

__all__ = ["InferenceBlock", "Optimization", "copy_for_evaluation", "copy_model", "fuse", "optimize"]
