"""Faster forms of whole networks.

Read downward: `fusion` (`fuse`: torchvision's and timm's blocks on this library's passes), `optimization`
(`optimize`: a copy for inference), `block` (what a residual block is made of).
"""

from ecanet.inference.fusion import fuse
from ecanet.inference.optimization import optimize

__all__ = ["fuse", "optimize"]
