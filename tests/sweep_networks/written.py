"""Networks as tutorials and papers write them, written anew: classifiers, U-Nets, discriminators, super-resolution."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep_networks.inputs import Builder, Network
from tensors import noise


def convolve(c: int, d: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution, a batch norm and a ReLU in a row."""
    layers = [nn.Conv2d(c, d, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build_tutorial(norm: bool, dropout: float) -> nn.Module:
    """Return the first network of many courses: convolutions and pools in one Sequential, then linear layers."""
    layers: list[nn.Module] = []
    for c, d in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(c, d, 3, padding=1)] + [nn.BatchNorm2d(d)] * norm + [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 5)
    )


class LeNet(nn.Module):
    """Convolutions whose ReLU and pool are functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 25, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


class UNet(nn.Module):
    """The U-Net of many pasted files: its levels are in lists, and the smaller map is padded to the skip's size."""

    def __init__(self, widths: Sequence[int] = (8, 16, 32), residual: bool = False):
        super().__init__()
        self.residual = residual
        self.downs = nn.ModuleList(map(self.pair, (3, *widths), widths))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(d, c, 2, 2) for c, d in pairwise(widths))
        self.ups_pairs = nn.ModuleList(self.pair(2 * c, c) for c in widths[:-1])
        self.skips = nn.ModuleList(nn.Conv2d(c, d, 1) for c, d in zip((3, *widths), widths, strict=False))
        self.out = nn.Conv2d(widths[0], 2, 1)

    def pair(self, c: int, d: int) -> nn.Module:
        return nn.Sequential(convolve(c, d), convolve(d, d))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, (down, skip) in enumerate(zip(self.downs, self.skips, strict=True)):
            x = F.max_pool2d(x, 2) if level else x
            x = down(x) + skip(x) if self.residual else down(x)
            kept.append(x)
        for level in reversed(range(len(self.ups))):
            x, skip = self.ups[level](x), kept[level]
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = self.ups_pairs[level](torch.cat((skip, x), 1))
        return self.out(x)


class StyleDiscriminator(nn.Module):
    """StyleGAN2's discriminator: equalized learning rates, scaled residual sums, minibatch deviation."""

    class Equal(nn.Module):
        """A convolution whose weight is scaled when it runs."""

        def __init__(self, c: int, d: int, kernel: int, stride: int = 1):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(d, c, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(d))
            self.stride, self.scale = stride, (c * kernel**2) ** -0.5

        def forward(self, x: Tensor) -> Tensor:
            padding = self.weight.shape[-1] // 2
            return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, padding)

    class Block(nn.Module):
        """Two convolutions beside a strided one."""

        def __init__(self, c: int, d: int):
            super().__init__()
            equal = StyleDiscriminator.Equal
            self.conv1, self.conv2, self.skip = equal(c, c, 3), equal(c, d, 3, 2), equal(c, d, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2) * 2**0.5
            return (out + self.skip(x)) / 2**0.5

    def __init__(self):
        super().__init__()
        self.stem = self.Equal(3, 8, 1)
        self.blocks = nn.Sequential(self.Block(8, 16), self.Block(16, 24))
        self.final, self.score = self.Equal(25, 16, 3), nn.Linear(16 * 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.leaky_relu(self.stem(x), 0.2))
        deviation = x.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = F.leaky_relu(self.final(torch.cat((x, deviation), 1)), 0.2)
        return self.score(x.flatten(1))


def build_dcgan(generator: bool) -> Network:
    """Return DCGAN's generator and noise, or its discriminator and images."""
    if generator:
        layers = [nn.ConvTranspose2d(10, 16, 4), nn.BatchNorm2d(16), nn.ReLU(True), nn.ConvTranspose2d(16, 8, 4, 2, 1)]
        layers += [nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()]
        return nn.Sequential(*layers), (noise(2, 10, 1, 1),)
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 16, 4, 2, 1), nn.InstanceNorm2d(16)]
    return nn.Sequential(
        *layers, nn.LeakyReLU(0.2, True), nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 1, 4))
    ), (noise(2, 3, 32, 32),)


class SuperResolution(nn.Module):
    """EDSR: residual blocks with a constant scale, a long skip, and pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        pair = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(True), nn.Conv2d(16, 16, 3, padding=1)]
        self.body = nn.ModuleList(nn.Sequential(*map(type(self).copy, pair)) for _ in range(3))
        self.tail = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

    @staticmethod
    def copy(layer: nn.Module) -> nn.Module:
        return nn.Conv2d(16, 16, 3, padding=1) if isinstance(layer, nn.Conv2d) else nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        for block in self.body:
            x = x + block(x) * 0.1
        return self.tail(first + x)


class Inception(nn.Module):
    """Parallel branches that are concatenated, two of them in a row."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.stem = convolve(3, c, stride=2)
        self.branches = nn.ModuleDict({f"k{k}": convolve(c, c // 4, k) for k in (1, 3, 5)})
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), convolve(c, c // 4, 1))
        self.head = nn.Linear(c, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(x)
        x = torch.cat([*(branch(x) for branch in self.branches.values()), self.pooled(x)], 1)
        return self.head(x.mean((2, 3))), {"features": x}


class Residual(nn.Module):
    """A residual block that adds in place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = convolve(channels, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += x
        return F.relu(out, inplace=True)


class Mixer(nn.Module):
    """Channels last: depthwise convolutions that are permuted to linear layers and back."""

    def __init__(self, channels: int = 12):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, 4)
        self.mixes = nn.ModuleList(nn.Conv2d(channels, channels, 5, padding=2, groups=channels) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.grow = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in range(2))
        self.shrink = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for mix, norm, grow, shrink in zip(self.mixes, self.norms, self.grow, self.shrink, strict=True):
            y = norm(mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            x = x + shrink(F.gelu(grow(y)))
        return x.mean((1, 2))


def pair(make: Any, *shape: int, **options: Any) -> Network:
    """Return the network that ``make`` builds, and one input of ``shape``."""
    return make(**options), (noise(2, *shape),)


NETWORKS: dict[str, Builder] = {
    "tutorial-sequential": partial(pair, build_tutorial, 3, 32, 32, norm=False, dropout=0.0),
    "tutorial-sequential-norm": partial(pair, build_tutorial, 3, 32, 32, norm=True, dropout=0.3),
    "lenet": partial(pair, LeNet, 3, 32, 32),
    "unet": partial(pair, UNet, 3, 36, 36),
    "unet-residual": partial(pair, UNet, 3, 32, 32, residual=True),
    "stylegan-discriminator": partial(pair, StyleDiscriminator, 3, 32, 32),
    "dcgan-generator": partial(build_dcgan, True),
    "patchgan-discriminator": partial(build_dcgan, False),
    "edsr": partial(pair, SuperResolution, 3, 16, 16),
    "inception": partial(pair, Inception, 3, 32, 32),
    "channels-last-mixer": partial(pair, Mixer, 3, 32, 32),
}
