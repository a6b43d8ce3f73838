"""Ways in which public code spells squeeze-excite, each written anew; and what only looks like it."""

import torch
from torch import nn
from torch.nn import functional as F

import ecanet
from attention_spellings import CHANNELS, Inner, Multiplied, Spelling, means, planes, taps


def two_layers(build, hidden=4, activation=None, **options):
    """Two layers with an activation between them."""
    return nn.Sequential(
        build(CHANNELS, hidden, **options), activation or nn.ReLU(inplace=True), build(hidden, CHANNELS, **options)
    )


def linear(**options):
    return two_layers(nn.Linear, **options)


def excite(gate, **parts):
    """x times a function of the means."""
    return Spelling(lambda m, x: x * planes(gate(m, means(x)), x), **parts)


def pooled(axes):
    """A pool and two convolutions with kernels of 1, in 1-D, 2-D and 3-D."""
    build = getattr(nn, f"Conv{axes}d")
    layers = two_layers(lambda a, b: build(a, b, 1))
    return Spelling(
        lambda m, x: x * m.layers(m.pool(x)).sigmoid(), pool=getattr(nn, f"AdaptiveAvgPool{axes}d")(1), layers=layers
    )


def channel_gate():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), two_layers(lambda a, b: nn.Conv2d(a, b, 1)), nn.Sigmoid())


def zeroed():
    """A gate that is 0.5 for any input until it is trained."""
    module = excite(lambda m, p: m.fc(p).sigmoid(), fc=linear())
    nn.init.zeros_(module.fc[2].weight)
    return module


class ChannelAndSpace(nn.Module):
    """scSE: its channel gate is a Sequential, its spatial gate is no channel attention."""

    def __init__(self):
        super().__init__()
        self.channel, self.space = channel_gate(), nn.Sequential(nn.Conv2d(CHANNELS, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.channel(x) + x * self.space(x)


SES = {
    "1-D": lambda: pooled(1),
    "2-D": lambda: pooled(2),
    "3-D": lambda: pooled(3),
    "Linear": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear()),
    "no bias": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(bias=False)),
    "hard sigmoid": lambda: excite(lambda m, p: F.hardsigmoid(m.fc(p)), fc=linear()),
    "clipped line": lambda: excite(lambda m, p: F.relu6(m.fc(p) + 3) / 6, fc=linear()),
    "tanh": lambda: excite(lambda m, p: m.fc(p).tanh() + 1, fc=linear()),
    "SiLU": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(activation=nn.SiLU())),
    "PReLU": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(activation=nn.PReLU())),
    "batch norm between": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(activation=nn.BatchNorm1d(4))),
    "layer norm between": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(activation=nn.LayerNorm(4))),
    "one layer": lambda: excite(lambda m, p: F.hardsigmoid(m.fc(p)), fc=nn.Linear(CHANNELS, CHANNELS)),
    "one hidden number": lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=linear(hidden=1)),
    "a weight for each channel": lambda: excite(lambda m, p: (m.weight * p).sigmoid(), weight=taps(CHANNELS)),
    "no parameters": lambda: excite(lambda m, p: p.sigmoid()),
    "grouped": lambda: Spelling(
        lambda m, x: x * m.conv(x.mean((2, 3), keepdim=True)).sigmoid(), conv=nn.Conv2d(CHANNELS, CHANNELS, 1, groups=4)
    ),
    "in place": lambda: Spelling(lambda m, x: x.mul_(planes(m.fc(means(x)).sigmoid(), x)), fc=linear()),
    "einsum": lambda: Spelling(lambda m, x: torch.einsum("nc...,nc->nc...", x, m.fc(means(x)).sigmoid()), fc=linear()),
    "residual": lambda: Spelling(lambda m, x: x + x * planes(m.fc(means(x)).sigmoid(), x), fc=linear()),
    "zeroed last layer": zeroed,
    "pool of fixed size": lambda: Spelling(
        lambda m, x: x * planes(m.fc(m.pool(x).flatten(1)).sigmoid(), x), fc=linear(), pool=nn.AvgPool2d(6)
    ),
    "this library's": lambda: ecanet.SE(CHANNELS, 4),
    "factor alone": lambda: Multiplied(channel_gate()),
    "channel gate beside a spatial one": ChannelAndSpace,
}
"""Modules, and parents of modules, each of which has one channel attention that is no ECA."""


NOT_SE = {
    "max pooling too": lambda: Spelling(
        lambda m, x: x * planes((m.fc(means(x)) + m.fc(x.flatten(2).amax(-1))).sigmoid(), x), fc=linear()
    ),
    "the spread within a plane too": lambda: Spelling(
        lambda m, x: x * planes(m.fc(x.flatten(2).std(-1)).sigmoid(), x), fc=linear()
    ),
    "more than the channel means": lambda: Spelling(
        lambda m, x: x * planes(m.fc((x * x.softmax(-1)).flatten(2).sum(-1)).sigmoid(), x), fc=linear()
    ),
    "mixes the images of a batch": lambda: excite(
        lambda m, p: m.fc(p.mean(0, keepdim=True)).sigmoid().expand_as(p), fc=linear()
    ),
    "returns several values": lambda: Inner(
        Spelling(lambda m, x: (x * planes(m.fc(means(x)).sigmoid(), x), None), fc=linear()),
        lambda g, x: g(x)[0].relu(),
    ),
    "axis 2": lambda: Inner(
        Spelling(lambda m, x: x * m.fc(x.mean(1, keepdim=True)).sigmoid(), fc=linear()),
        lambda g, x: g(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape).relu(),
    ),
}
"""Modules that scale channels but are not replaced, by the reason."""


NO_ATTENTION = {
    "spatial gate": lambda: Spelling(lambda m, x: x * m.conv(x).sigmoid(), conv=nn.Conv2d(CHANNELS, 1, 1)),
    "pixel gate": lambda: Spelling(lambda m, x: x * m.conv(x).sigmoid(), conv=nn.Conv2d(CHANNELS, CHANNELS, 1)),
    "layer scale": lambda: Spelling(lambda m, x: x * planes(m.scale[None], x), scale=taps(CHANNELS)),
    "nothing": lambda: Spelling(lambda m, x: x),
    "dropout": lambda: Spelling(lambda m, x: F.dropout(x, 0.5, m.training)),
    "added context": lambda: Spelling(lambda m, x: x + planes(m.fc(means(x)).sigmoid(), x), fc=linear()),
    "zeroed residual block": lambda: Spelling(
        lambda m, x: x + m.scale * m.conv(x).relu(),
        conv=nn.Conv2d(CHANNELS, CHANNELS, 1),
        scale=nn.Parameter(torch.zeros(1)),
    ),
    "gate on neighbours": lambda: Spelling(
        lambda m, x: x * m.conv(x).mean((2, 3), keepdim=True).sigmoid(), conv=nn.Conv2d(CHANNELS, CHANNELS, 3)
    ),
    "pooling": lambda: Multiplied(Spelling(lambda m, x: x.mean((2, 3), keepdim=True)), times=torch.add),
}
"""Modules that are no channel attention, and are never touched."""
