"""One name for any network, and one name for any device.

Read downward: `names` (``resnet50`` is this library's, ``timm:NAME`` and ``torchvision:NAME`` are theirs), `devices`
(``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``).
"""

from ecanet.networks.devices import find_device
from ecanet.networks.names import find, image_size, is_ours

__all__ = ["find", "find_device", "image_size", "is_ours"]
