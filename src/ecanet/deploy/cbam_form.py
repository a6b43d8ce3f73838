"""Write CBAM in the fewest operations: one row of layers for both descriptors of a gate."""

import copy
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ecanet.attention import CBAM
from ecanet.ops import overrides_forward

__all__ = ["ExportedCBAM", "is_own_cbam"]


class ExportedCBAM(nn.Module):
    """CBAM (N, C, H, W) -> (N, C, H, W) in 14 operations, 8 for its channel gate and 6 for its spatial gate.

    Mean and maximum of the channels are two rows of one map (N, C, 2, 1), so the MLP runs once. Its second layer is a
    convolution over both rows, which adds them: no operation is left for the sum, and the layer has its weights twice.
    A gain other than 1 is one operation more.
    """

    def __init__(self, attention: CBAM):
        super().__init__()
        hidden, channels = attention.fc1.weight.shape
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, (2, 1), bias=False)
        self.spatial = copy.deepcopy(attention.spatial)
        first, second = (layer.weight.detach()[..., None, None] for layer in (attention.fc1, attention.fc2))
        self.fc1.weight = nn.Parameter(first.clone())
        self.fc2.weight = nn.Parameter(torch.cat([second, second], 2))
        self.gain = attention.gain**2
        """Of both gates together, which stand in one product."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times both gates."""
        p = torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 2)  # N C 2 1
        u = x * self.fc2(self.fc1(p).relu()).sigmoid()
        maps = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)  # N 2 H W
        g = self.spatial(maps).sigmoid()
        return u * (g if self.gain == 1 else self.gain * g)


def is_own_cbam(attention: nn.Module) -> TypeGuard[CBAM]:
    """Return whether ``attention`` is this library's CBAM, whose steps and layers nobody has replaced."""
    if type(attention) is not CBAM or any(map(overrides_forward, attention.modules())):
        return False
    replaced = {"channel_gate", "spatial_gate"} & vars(attention).keys()
    layers = (attention.fc1, attention.fc2)
    return not replaced and all(type(layer) is nn.Linear and "bias" not in layer.state_dict() for layer in layers)
