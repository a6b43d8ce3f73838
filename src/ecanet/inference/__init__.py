"""Faster forms of whole networks.

Read downward: `fusion` (`fuse`: runs torchvision's and timm's blocks by their parts), `optimization` (`optimize`:
makes a copy for inference). What a block is made of, and how it is run, is described in `ecanet.models`.
"""

from ecanet.inference.fusion import fuse
from ecanet.inference.optimization import InferenceBlock, optimize

__all__ = ["InferenceBlock", "fuse", "optimize"]
