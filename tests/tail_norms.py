"""The norms with which residual tails are tested: each a function from a number of channels to a module."""

from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def make_frozen(channels):
    """Return torchvision's frozen batch norm with random statistics."""
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 1.5), norm.running_var.uniform_(0.5, 2), norm.bias.normal_()
    return norm


NORMS = {
    "training": nn.BatchNorm2d,
    "evaluation": lambda c: nn.BatchNorm2d(c).eval(),
    "frozen": make_frozen,
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
}
