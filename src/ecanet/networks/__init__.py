"""One name for any network, and one name for any device.

Read downward: `pretrained` (a trained network in a folder), `building` (any classifier, with weights, attention and a
head), `loading` (weights into a network), `heads` (the layer that gives the logits), `preprocessing` (the images that a
network is made for), `names` (``resnet50`` is this library's, ``timm:NAME`` and ``torchvision:NAME`` are theirs),
`factories` (``FILE.py:FACTORY`` is yours), `devices` (``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``).
"""

from ecanet.networks.building import Built, build, list_gates, load_and_attach
from ecanet.networks.devices import find_device
from ecanet.networks.factories import check_class, find_factory, trust, trust_class
from ecanet.networks.heads import exchange_head, find_head
from ecanet.networks.loading import CONFIG, WEIGHTS, check_fit, find_weights, limit_numbers, load_weights
from ecanet.networks.names import find, find_kind, find_library, is_ours, list_names
from ecanet.networks.preprocessing import (
    Preprocessing,
    detector_classes,
    find_preprocessing,
    image_size,
    imagenet_classes,
)
from ecanet.networks.pretrained import (
    Pretrained,
    build_pretrained,
    is_pretrained,
    list_gate_sites,
    load_pretrained,
    name_colour_order,
    read_pretrained,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Built",
    "Preprocessing",
    "Pretrained",
    "build",
    "build_pretrained",
    "check_class",
    "check_fit",
    "detector_classes",
    "exchange_head",
    "find",
    "find_device",
    "find_factory",
    "find_head",
    "find_kind",
    "find_library",
    "find_preprocessing",
    "find_weights",
    "image_size",
    "imagenet_classes",
    "is_ours",
    "is_pretrained",
    "limit_numbers",
    "list_gate_sites",
    "list_gates",
    "list_names",
    "load_and_attach",
    "load_pretrained",
    "load_weights",
    "name_colour_order",
    "read_pretrained",
    "trust",
    "trust_class",
]
