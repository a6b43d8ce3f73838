"""One name for any network.

Read downward: `names` (``resnet50`` is this library's, ``timm:NAME`` and ``torchvision:NAME`` are theirs).
"""

from ecanet.networks.names import find, image_size, is_ours

__all__ = ["find", "image_size", "is_ours"]
