"""Networks for signals and sequences, written anew: 1-D residual networks, dilated ones, encoders of raw audio."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sweep_networks.inputs import Builder, Network
from tensors import noise


class Block(nn.Module):
    """A residual block of a network for signals."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(channels, channels, 5, padding=2), nn.BatchNorm1d(channels), nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2), nn.BatchNorm1d(channels), nn.Dropout(0.1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def build_residual() -> Network:
    """Return a 1-D residual network, and two signals."""
    blocks = [Block(12) for _ in range(3)]
    return nn.Sequential(nn.Conv1d(2, 12, 7), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten()), (noise(2, 2, 50),)


class Temporal(nn.Module):
    """A block of a temporal convolutional network: causal by cutting off the end, with weight norm."""

    def __init__(self, c: int, d: int, dilation: int):
        super().__init__()
        self.cut = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(c, d, 3, padding=self.cut, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(d, d, 3, padding=self.cut, dilation=dilation))
        self.downsample = nn.Conv1d(c, d, 1) if c != d else None
        self.dropout, self.relu = nn.Dropout(0.1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.relu(self.conv1(x)[..., : -self.cut]))
        out = self.dropout(self.relu(self.conv2(out)[..., : -self.cut]))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class WaveNet(nn.Module):
    """Dilated convolutions with gated units; each layer gives a residual and a skip."""

    def __init__(self, channels: int = 8, layers: int = 3):
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 1)
        self.dilated = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 3, padding=2**i, dilation=2**i) for i in range(layers)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for dilated, residual, skip in zip(self.dilated, self.residuals, self.skips, strict=True):
            a, b = dilated(x).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total = total + skip(y)
            x = x + residual(y)
        return self.out(total)


class AudioEncoder(nn.Module):
    """wav2vec's tower on raw audio, with channels on the last axis for its norms, and a transformer after it."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else channels, channels, k, s) for i, (k, s) in enumerate(((10, 5), (3, 2), (3, 2)))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in self.convs)
        self.encoder = nn.TransformerEncoderLayer(channels, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, audio: Tensor) -> Tensor:
        x = audio[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2))
        return self.encoder(x.transpose(1, 2))


class Spectral(nn.Module):
    """A 1-D network whose blocks keep (N, L, C), as those of forecasting libraries do."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.embed = nn.Linear(3, channels)
        self.conv1, self.conv2 = nn.Conv1d(channels, 16, 1), nn.Conv1d(16, channels, 1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            y = self.conv2(F.relu(self.conv1(x.transpose(-1, 1)))).transpose(-1, 1)
            x = self.norm(x + y)
        return x


class Inception(nn.Module):
    """InceptionTime: parallel kernels on a bottleneck, concatenated, with a shortcut around two of them."""

    class Module(nn.Module):
        """One inception module."""

        def __init__(self, c: int, d: int):
            super().__init__()
            self.bottleneck = nn.Conv1d(c, d, 1, bias=False)
            self.convs = nn.ModuleList(nn.Conv1d(d, d, k, padding="same", bias=False) for k in (3, 5, 9))
            self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(c, d, 1, bias=False))
            self.norm = nn.BatchNorm1d(4 * d)

        def forward(self, x: Tensor) -> Tensor:
            narrow = self.bottleneck(x)
            return F.relu(self.norm(torch.cat([*(conv(narrow) for conv in self.convs), self.pooled(x)], 1)))

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Module(2, 4), self.Module(16, 4)
        self.shortcut = nn.Sequential(nn.Conv1d(2, 16, 1), nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(self.one(x)) + self.shortcut(x)).mean(2)


class Recognizer(nn.Module):
    """CRNN: convolutions on a line of text, then a recurrent layer over its columns."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Conv2d(16, 16, (4, 1)), nn.ReLU(),
        )  # fmt: skip
        self.recurrent, self.head = nn.LSTM(16, 8, bidirectional=True, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.convs(x).squeeze(2).transpose(1, 2)
        return self.head(self.recurrent(columns)[0]).log_softmax(-1)


def build_tcn() -> Network:
    """Return a temporal convolutional network, and two signals."""
    return nn.Sequential(Temporal(2, 8, 1), Temporal(8, 8, 2), Temporal(8, 12, 4)), (noise(2, 2, 40),)


def pair(make: Callable[[], nn.Module], *shape: int) -> Network:
    """Return the network that ``make`` builds, and one input of ``shape``."""
    return make(), (noise(2, *shape),)


NETWORKS: dict[str, Builder] = {
    "signals": build_residual,
    "tcn": build_tcn,
    "wavenet": partial(pair, WaveNet, 1, 60),
    "audio-encoder": partial(pair, AudioEncoder, 200),
    "forecaster-channels-last": partial(pair, Spectral, 20, 3),
    "inception-time": partial(pair, Inception, 2, 40),
    "crnn": partial(pair, Recognizer, 1, 16, 40),
}
