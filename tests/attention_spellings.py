"""Ways in which public code spells ECA and squeeze-excite, each written anew and as short as it can be."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CHANNELS = 12


class Spelling(nn.Module):
    """A module whose forward is a function of itself and x."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x, *more, **named):
        return self.run(self, x, *more, **named)


class Multiplied(nn.Module):
    """A parent that multiplies by what its child returns, and computes more."""

    def __init__(self, gate, call=lambda gate, x: gate(x), times=torch.mul):
        super().__init__()
        self.gate, self.call, self.times = gate, call, times

    def forward(self, x):
        return self.times(x, self.call(self.gate, x)).relu()


class Inner(nn.Module):
    """A parent that is no channel attention, around a child that is."""

    def __init__(self, gate, call=None):
        super().__init__()
        self.gate, self.call = gate, call or relu

    def forward(self, x):
        return self.call(self.gate, x)


def conv(k=3, axes=1, **options):
    """A convolution over channels, along the first of its axes."""
    kernel, padding = (k, *(1,) * (axes - 1)), (k // 2, *(0,) * (axes - 1))
    return getattr(nn, f"Conv{axes}d")(1, 1, kernel, **{"padding": padding, "bias": False, **options})


def means(x):
    return x.flatten(2).mean(-1)


def planes(g, x):
    return g.view(*g.shape, *(1,) * (x.dim() - 2))


def gate(module, x):
    """The factor (N, C) with any module over (N, 1, C)."""
    return module.conv(means(x)[:, None])[:, 0].sigmoid()


def product(module, x):
    return x * planes(gate(module, x), x)


def authors(axes):
    """The authors' own text, in 1-D, 2-D and 3-D."""
    pool = getattr(nn, f"AdaptiveAvgPool{axes}d")(1)

    def forward(m, x):
        y = m.pool(x).flatten(2)
        y = m.conv(y.transpose(-1, -2)).transpose(-1, -2)
        return x * m.sigmoid(y).reshape(x.shape[:2] + (1,) * axes).expand_as(x)

    return Spelling(forward, pool=pool, conv=conv(5), sigmoid=nn.Sigmoid())


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv())


def taps(*shape):
    return nn.Parameter(torch.randn(shape))


def in_place(m, x):
    x *= planes(gate(m, x), x)
    return x


def with_buffer():
    module = Spelling(lambda m, x: x * planes(F.conv1d(means(x)[:, None], m.blur, padding=1)[:, 0].sigmoid(), x))
    module.register_buffer("blur", torch.tensor([[[0.25, 0.5, 0.25]]]))
    return module


def factor(module, x):
    return planes(gate(module, x), x)


def factor_of(**parts):
    return Spelling(factor, **parts)


def relu(gate, x):
    return gate(x).relu()


ECAS = {
    "authors 1-D": lambda: authors(1),
    "authors 2-D": lambda: authors(2),
    "authors 3-D": lambda: authors(3),
    "mean and view": lambda: Spelling(product, conv=conv()),
    "bias": lambda: Spelling(product, conv=conv(bias=True)),
    "one tap": lambda: Spelling(product, conv=conv(1)),
    "one tap, bias": lambda: Spelling(product, conv=conv(1, bias=True)),
    "nine taps": lambda: Spelling(product, conv=conv(9)),
    "more taps than channels": lambda: Spelling(product, conv=conv(15)),
    "padding same": lambda: Spelling(product, conv=conv(padding="same")),
    "circular convolution": lambda: Spelling(product, conv=conv(padding_mode="circular")),
    "circular pad, bias": lambda: Spelling(
        lambda m, x: x * planes(m.conv(F.pad(means(x)[:, None], (1, 1), mode="circular"))[:, 0].sigmoid(), x),
        conv=conv(padding=0, bias=True),
    ),
    "x *= y": lambda: Spelling(in_place, conv=conv()),
    "x.mul_(y)": lambda: Spelling(lambda m, x: x.mul_(planes(gate(m, x), x)), conv=conv()),
    "torch.mul": lambda: Spelling(lambda m, x: torch.mul(x, planes(gate(m, x), x).expand_as(x)), conv=conv()),
    "einsum": lambda: Spelling(lambda m, x: torch.einsum("nchw,nc->nchw", x, gate(m, x)), conv=conv()),
    "Parameter (1, 1, k)": lambda: Spelling(
        lambda m, x: x * planes(F.conv1d(means(x)[:, None], m.kernel, padding=1)[:, 0].sigmoid(), x),
        kernel=taps(1, 1, 3),
    ),
    "Parameter (k,) and bias": lambda: Spelling(
        lambda m, x: (
            x * planes(F.conv1d(means(x)[:, None], m.kernel.view(1, 1, -1), m.shift, padding=2)[:, 0].sigmoid(), x)
        ),
        kernel=taps(5),
        shift=taps(1),
    ),
    "Conv2d (k, 1)": lambda: Spelling(
        lambda m, x: x * m.conv(x.mean((2, 3), keepdim=True).transpose(1, 2)).transpose(1, 2).sigmoid(),
        conv=conv(3, 2),
    ),
    "Conv2d (1, k)": lambda: Spelling(
        lambda m, x: x * m.conv(means(x)[:, None, None]).permute(0, 3, 1, 2).sigmoid(),
        conv=nn.Conv2d(1, 1, (1, 5), padding=(0, 2)),
    ),
    "Conv3d (k, 1, 1)": lambda: Spelling(
        lambda m, x: x * m.conv(x.mean((2, 3), keepdim=True)[:, None])[:, 0].sigmoid(), conv=conv(3, 3)
    ),
    "transposed convolution": lambda: Spelling(product, conv=nn.ConvTranspose1d(1, 1, 3, padding=1, bias=False)),
    "weight norm": lambda: Spelling(product, conv=parametrizations.weight_norm(conv())),
    "old weight norm": lambda: Spelling(product, conv=old_weight_norm()),
    "spectral norm": lambda: Spelling(product, conv=parametrizations.spectral_norm(conv())),
    "unfold": lambda: Spelling(
        lambda m, x: x * planes((F.pad(means(x), (1, 1)).unfold(1, 3, 1) * m.kernel).sum(-1).sigmoid(), x),
        kernel=taps(3),
    ),
    "pool of fixed size": lambda: Spelling(
        lambda m, x: x * planes(m.conv(m.pool(x).flatten(1)[:, None])[:, 0].sigmoid(), x),
        conv=conv(),
        pool=nn.AvgPool2d(6),
    ),
    "F.avg_pool2d": lambda: Spelling(
        lambda m, x: x * planes(m.conv(F.avg_pool2d(x, x.shape[2:]).flatten(1)[:, None])[:, 0].sigmoid(), x),
        conv=conv(),
    ),
    "sum over H W": lambda: Spelling(
        lambda m, x: x * planes(m.conv(x.sum((2, 3))[:, None] / x[0, 0].numel())[:, 0].sigmoid(), x), conv=conv()
    ),
    "exp": lambda: Spelling(lambda m, x: x / (1 + (-planes(m.conv(means(x)[:, None])[:, 0], x)).exp()), conv=conv()),
    "float32 inside": lambda: Spelling(
        lambda m, x: (
            x.float() * planes(torch.sigmoid(F.conv1d(means(x.float())[:, None], m.kernel.float(), padding=1))[:, 0], x)
        ).to(x.dtype),
        kernel=taps(1, 1, 3),
    ),
    "Sequential inside": lambda: Spelling(
        lambda m, x: x * planes(m.gate(means(x)[:, None])[:, 0], x), gate=nn.Sequential(conv(), nn.Sigmoid())
    ),
    "fixed batch": lambda: Spelling(
        lambda m, x: x * m.conv(means(x).view(2, 1, CHANNELS)).sigmoid().view(2, CHANNELS, 1, 1), conv=conv()
    ),
    "buffer": with_buffer,
    "factor alone": lambda: Multiplied(factor_of(conv=conv())),
    "factor alone, expanded": lambda: Multiplied(
        Spelling(lambda m, x: planes(gate(m, x), x).expand_as(x), conv=conv(bias=True))
    ),
    "factor alone, flat": lambda: Multiplied(Spelling(gate, conv=conv()), times=lambda x, g: x * g[:, :, None, None]),
    "called by forward": lambda: Inner(Spelling(product, conv=conv()), lambda g, x: g.forward(x).relu()),
    "factor alone, called by forward": lambda: Multiplied(factor_of(conv=conv()), call=lambda g, x: g.forward(x)),
    "input added by the parent": lambda: Inner(factor_of(conv=conv()), lambda g, x: x + x * g(x)),
    "multiplied by the parent": lambda: Inner(factor_of(conv=conv()), lambda g, x: x * g(x)),
}
"""Modules, and parents of modules, each of which computes the paper's ECA."""


def rest(module, x, pool):
    """A factor that depends on the means and on another statistic."""
    return x * planes(module.conv((means(x) + pool(x.flatten(2)))[:, None])[:, 0].sigmoid(), x)


NOT_ECA = {
    "kernel of even size 4": lambda: Spelling(product, conv=nn.Sequential(nn.ZeroPad1d((1, 2)), conv(4, padding=0))),
    "hard sigmoid": lambda: Spelling(
        lambda m, x: x * planes(F.hardsigmoid(m.conv(means(x)[:, None])[:, 0]), x), conv=conv()
    ),
    "softmax": lambda: Spelling(lambda m, x: x * planes(m.conv(means(x)[:, None])[:, 0].softmax(1), x), conv=conv()),
    "2 convolutions": lambda: Spelling(product, conv=nn.Sequential(conv(), nn.ReLU(), conv())),
    "max pooling too": lambda: Spelling(lambda m, x: rest(m, x, lambda y: y.amax(-1)), conv=conv()),
    "the spread within a plane too": lambda: Spelling(lambda m, x: rest(m, x, lambda y: y.std(-1)), conv=conv()),
    "one kernel for each channel": lambda: Spelling(
        lambda m, x: x * planes((F.pad(means(x), (1, 1)).unfold(1, 3, 1) * m.kernel).sum(-1).sigmoid(), x),
        kernel=taps(CHANNELS, 3),
    ),
    "dilation 2": lambda: Spelling(product, conv=conv(dilation=2, padding=2)),
    "pads with 'reflect'": lambda: Spelling(product, conv=conv(padding_mode="reflect")),
    "x + x * gate": lambda: Spelling(lambda m, x: x + product(m, x), conv=conv()),
    "returns several values": lambda: Inner(
        Spelling(lambda m, x: (product(m, x), gate(m, x)), conv=conv()), lambda g, x: g(x)[0].relu()
    ),
    "other arguments than x": lambda: Inner(
        Spelling(lambda m, x, scale: product(m, x), conv=conv()), lambda g, x: g(x, scale=x.new_ones(3)).relu()
    ),
    "axis 2": lambda: Inner(
        Spelling(lambda m, x: x * m.conv(x.mean(1, keepdim=True)).sigmoid(), conv=conv()),
        lambda g, x: g(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape).relu(),
    ),
    "contains a 3 x 3 convolution": lambda: Spelling(
        lambda m, x: x * m.conv(x.mean((2, 3), keepdim=True).transpose(1, 2)).transpose(1, 2).sigmoid(),
        conv=nn.Conv2d(1, 1, 3, padding=1, bias=False),
    ),
}
"""Modules that resemble ECA, by the reason why they are not converted."""
