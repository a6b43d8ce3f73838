"""Networks that run modules several times, recursively, by their children, or on complex numbers, written anew."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep_networks.inputs import Builder
from sweep_networks.written import Residual, convolve, pair
from tensors import noise


class Recurrent(nn.Module):
    """R2U-Net's recurrent convolution: one convolution runs several times, each time on input plus state."""

    def __init__(self, channels: int = 8, steps: int = 2):
        super().__init__()
        self.steps = steps
        self.stem, self.conv, self.again = (
            convolve(3, channels),
            convolve(channels, channels),
            convolve(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for layer in (self.conv, self.again):
            state = layer(x)
            for _ in range(self.steps):
                state = layer(x + state)
            x = state
        return first + x


class ConvLSTM(nn.Module):
    """A convolutional LSTM over the frames of a clip."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(3 + channels, 4 * channels, 3, padding=1)
        self.out = nn.Sequential(convolve(channels, channels), nn.Conv2d(channels, 2, 1))

    def forward(self, clip: Tensor) -> Tensor:
        n, frames, _, *size = clip.shape
        hidden = cell = clip.new_zeros(n, self.channels, *size)
        for frame in range(frames):
            i, f, o, g = self.gates(torch.cat((clip[:, frame], hidden), 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return self.out(hidden)


class SharedDepth(nn.Module):
    """A residual block that runs several times with the same weights (a universal, or ODE-like network)."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, 2, 1), nn.GroupNorm(2, channels)
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + 0.25 * self.branch(x)
        return self.norm(x).mean((2, 3))


class Hourglass(nn.Module):
    """A recursive hourglass: each level holds a smaller one, and all add."""

    def __init__(self, depth: int, channels: int = 8):
        super().__init__()
        self.upper, self.lower = convolve(channels, channels), convolve(channels, channels)
        self.inner = Hourglass(depth - 1, channels) if depth else convolve(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        below = self.inner(self.lower(F.max_pool2d(x, 2)))
        return self.upper(x) + F.interpolate(below, scale_factor=2.0)


class ByChildren(nn.Module):
    """A network whose forward runs whatever children it has, one after the other."""

    def __init__(self, residual: bool):
        super().__init__()
        self.residual = residual
        self.one, self.two, self.three = convolve(3, 8), convolve(8, 8), convolve(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            y = child(x)
            x = x + y if self.residual and x.shape == y.shape else y
        return x


class Siamese(nn.Module):
    """One encoder for two images, and the distance of what it makes of them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(convolve(3, 8, stride=2), Residual(8), convolve(8, 16, stride=2), Residual(16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.pairwise_distance(self.encoder(a).mean((2, 3)), self.encoder(b).mean((2, 3)))


class Complex(nn.Module):
    """A residual network of complex numbers: the Fourier transform of an image, complex convolutions, magnitudes."""

    def __init__(self, split: bool):
        super().__init__()
        self.split = split
        self.stem = nn.Conv2d(3, 8, 3, padding=1, dtype=None if split else torch.complex64)
        self.imaginary = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)
        self.again = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)
        self.head = nn.Sequential(convolve(8, 8), Residual(8)) if split else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        x = torch.fft.fft2(image)
        x = torch.complex(self.stem(x.real), self.imaginary(x.imag)) if self.split else self.stem(x)
        y = self.conv(x)
        x = x + self.again(torch.complex(y.real.relu(), y.imag.relu()))
        return self.head(x.abs().log1p())


NETWORKS: dict[str, Builder] = {
    "recurrent-convolution": partial(pair, Recurrent, 3, 16, 16),
    "conv-lstm": partial(pair, ConvLSTM, 4, 3, 16, 16),
    "shared-depth": partial(pair, SharedDepth, 3, 16, 16),
    "hourglass": partial(pair, lambda: nn.Sequential(convolve(3, 8), Hourglass(2)), 3, 32, 32),
    "by-children": partial(pair, ByChildren, 3, 16, 16, residual=False),
    "by-children-residual": partial(pair, ByChildren, 3, 16, 16, residual=True),
    "siamese": lambda: (Siamese(), (noise(2, 3, 32, 32), noise(2, 3, 32, 32).flip(3))),
    "complex": partial(pair, Complex, 3, 16, 16, split=False),
    "complex-then-real": partial(pair, Complex, 3, 16, 16, split=True),
}
