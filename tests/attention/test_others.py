"""CBAM, GC, GSoP, A2, non-local and attention-augmented convolution: each against its equation written as loops."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecanet
from drawn_modules import check_padding, draw, image
from ecanet.attention import CBAM, AugmentedConv2d, DoubleAttention, GlobalContext, GSoP, NonLocal
from ecanet.attention.long_range import shrink
from ecanet.errors import AttachError, ConfigError
from ecanet.studies.cost import count, find_attention_modules

OTHERS = ("cbam", "gc", "gsop", "a2", "non-local", "aa")
BUILD = {
    "cbam": lambda: CBAM(8, reduction=2),
    "gc": lambda: GlobalContext(8, reduction=2),
    "gsop": lambda: GSoP(8, width=3),
    "a2": lambda: DoubleAttention(8),
    "non-local": lambda: NonLocal(8),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return draw(BUILD[name](), dtype)


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def cells(x: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2])]


def cbam_of(m: CBAM, x: Tensor) -> Tensor:
    """One image (C, H, W), position by position."""
    channels, height, width = x.shape
    w1, w2, kernel = m.fc1.weight, m.fc2.weight, m.spatial.weight[0]
    out = torch.zeros_like(x)
    logits = torch.zeros(channels, dtype=x.dtype)
    for pooled in (
        [sum(x[c, i, j] for i, j in cells(x)) / height / width for c in range(channels)],
        [max(x[c, i, j] for i, j in cells(x)) for c in range(channels)],
    ):
        hidden = [max(0, sum(w1[h, c] * pooled[c] for c in range(channels))) for h in range(len(w1))]
        for c in range(channels):
            logits[c] += sum(w2[c, h] * hidden[h] for h in range(len(w1)))
    u = torch.stack([x[c] * sigmoid(logits[c]) for c in range(channels)])
    for i, j in cells(x):
        total = 0.0
        for a in range(7):
            for b in range(7):
                at, to = i + a - 3, j + b - 3
                if 0 <= at < height and 0 <= to < width:
                    total += kernel[0, a, b] * u[:, at, to].sum() / channels + kernel[1, a, b] * max(u[:, at, to])
        out[:, i, j] = u[:, i, j] * sigmoid(total)
    return out


def gc_of(m: GlobalContext, x: Tensor) -> Tensor:
    weights = softmax([float(m.key.weight[0, :, 0] @ x[:, i, j]) for i, j in cells(x)])
    context = sum(w * x[:, i, j] for w, (i, j) in zip(weights, cells(x), strict=True))
    hidden = m.fc1.weight @ context + m.fc1.bias
    spread = ((hidden - hidden.mean()) ** 2).mean()
    hidden = (hidden - hidden.mean()) / (spread + m.norm.eps) ** 0.5 * m.norm.weight + m.norm.bias
    update = m.fc2.weight @ hidden.clamp(min=0) + m.fc2.bias
    return x + update[:, None, None]


def normed(v: Tensor, norm: nn.BatchNorm1d, row: int) -> Tensor:
    r = (norm.running_var[row] + norm.eps) ** -0.5
    return (v - norm.running_mean[row]) * r * norm.weight[row] + norm.bias[row]


def gsop_of(m: GSoP, x: Tensor) -> Tensor:
    d, points = len(m.reduce.weight), [x[:, i, j] for i, j in cells(x)]
    z = torch.stack([normed(torch.stack([m.reduce.weight[r, :, 0] @ p for p in points]), m.norm, r) for r in range(d)])
    z = z.clamp(min=0)
    s = torch.zeros(d, d, dtype=x.dtype)
    for a in range(d):
        for b in range(d):
            s[a, b] = ((z[a] - z[a].mean()) * (z[b] - z[b].mean())).sum() / len(points)
    rows = []
    for a in range(d):
        row = normed(s[a], m.row_norm, a)
        rows += [m.rows.weight[4 * a + o, 0] @ row + m.rows.bias[4 * a + o] for o in range(4)]
    v = torch.stack([r if r > 0 else 0.1 * r for r in rows])
    g = [sigmoid(float(m.fc.weight[c] @ v + m.fc.bias[c])) for c in range(len(x))]
    return torch.stack([x[c] * g[c] for c in range(len(x))])


def non_local_of(m: NonLocal, x: Tensor) -> Tensor:
    out = x.clone()
    theta, phi, g, wz = (layer.weight[..., 0] for layer in (m.theta, m.phi, m.g, m.out))
    for i, j in cells(x):
        weights = softmax([float((theta @ x[:, i, j]) @ (phi @ x[:, k, n])) for k, n in cells(x)])
        seen = sum(w * (g @ x[:, k, n]) for w, (k, n) in zip(weights, cells(x), strict=True))
        out[:, i, j] += wz @ seen
    return out


def a2_of(m: DoubleAttention, x: Tensor) -> Tensor:
    a, b, v, wz = (layer.weight[..., 0] for layer in (m.features, m.gather, m.distribute, m.out))
    descriptors = []
    for row in b:
        weights = softmax([float(row @ x[:, i, j]) for i, j in cells(x)])
        descriptors.append(sum(w * (a @ x[:, i, j]) for w, (i, j) in zip(weights, cells(x), strict=True)))
    out = x.clone()
    for i, j in cells(x):
        share = softmax([float(row @ x[:, i, j]) for row in v])
        out[:, i, j] += wz @ sum(s * d for s, d in zip(share, descriptors, strict=True))
    return out


LOOPS = {"cbam": cbam_of, "gc": gc_of, "gsop": gsop_of, "non-local": non_local_of, "a2": a2_of}


@pytest.mark.parametrize("name", LOOPS)
def test_the_equation_as_loops(name):
    module, x = made(name), image(2, 8, 3, 5)
    with torch.no_grad():
        expected = torch.stack([LOOPS[name](module, one) for one in x])
        # 1e-9 is far above float64's rounding in sums of some hundred terms and far below any change of a term
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_augmented_convolution_as_loops(stride):
    torch.manual_seed(0)
    module = AugmentedConv2d(3, 10, stride=stride, heads=2).double()
    x = image(3, 5, 4)
    with torch.no_grad():
        y = module(x[None])[0]
        padded, kernel = F.pad(x, (1, 1, 1, 1)), module.conv.weight
        values, depth, centre = 10 - len(kernel), module.rows.shape[1], module.LARGEST - 1
        grid = [(i, j) for i in range(0, 5, stride) for j in range(0, 4, stride)]
        pooled = {}
        for i, j in grid:
            window = padded[:, i : i + 3, j : j + 3]
            for o in range(len(kernel)):
                close(y[o, i // stride, j // stride], (kernel[o] * window).sum())
            pooled[i // stride, j // stride] = x[:, i, j] if stride == 1 else window.sum((1, 2)) / 9
        qkv = {at: module.qkv.weight[..., 0, 0] @ value for at, value in pooled.items()}
        for (i, j), mine in qkv.items():
            seen = []
            for h in range(2):
                q = mine[h * depth : (h + 1) * depth]
                logits = []
                for (a, b), theirs in qkv.items():
                    k = theirs[(2 + h) * depth : (3 + h) * depth]
                    r = module.rows[a - i + centre] + module.columns[b - j + centre]
                    logits.append(float(q @ k + q @ r) / depth**0.5)
                per_head = values // 2
                v = [t[4 * depth + h * per_head :][:per_head] for t in qkv.values()]
                seen.append(sum(w * t for w, t in zip(softmax(logits), v, strict=True)))
            close(y[len(kernel) :, i, j], module.out.weight[..., 0, 0] @ torch.cat(seen))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_augmented_convolution_looks_at_small_maps_only():
    module = AugmentedConv2d(16, 32, stride=2)
    assert shrink(torch.zeros(1, 16, 56, 56), 2, module.LARGEST).shape[2:] == (
        14,
        14,
    )  # 28 x 28 outputs are seen at half size
    assert shrink(torch.zeros(1, 16, 28, 28), 2, module.LARGEST).shape[2:] == (14, 14)
    assert module(torch.randn(2, 16, 57, 41)).shape == (2, 32, 29, 21)


@pytest.mark.parametrize("name", BUILD)
def test_padding_has_no_influence(name):
    check_padding(made(name), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUILD)
def test_neutral_is_the_identity_bit_for_bit_and_learns(name, dtype):
    module, x = made(name, dtype), image(2, 8, 3, 5, dtype=dtype)
    assert not torch.equal(module(x), x)
    module.neutralize()
    y = module(x)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    (y.float() * image(*y.shape, dtype=torch.float32)).sum().backward()
    gated = hasattr(module, "last_parameters")
    last = list(module.last_parameters()) if gated else [p for p in module.parameters() if not p.any()]
    assert last
    assert all(p.grad is not None and p.grad.any() for p in last)
    again = BUILD[name]().to(dtype).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), x)  # the state dict carries the neutral form


@pytest.mark.parametrize("name", sorted(BUILD.keys() - {"cbam"}))
def test_any_number_of_axes(name):
    module = made(name)
    x = image(2, 8, 12)
    flat = module(x)
    for shape in ((2, 8, 3, 4), (2, 8, 2, 3, 2)):
        torch.testing.assert_close(module(x.reshape(shape)).flatten(2), flat, rtol=1e-12, atol=1e-12)
    assert module(x[:, :, 0]).shape == (2, 8)
    assert module(x[:0]).shape == (0, 8, 12)


def sites(attention: str, name: str, **options: object) -> list[str]:
    model = ecanet.create_model(name, attention=attention, **options)
    found = find_attention_modules(model)
    return [n for n, m in model.named_modules() if any(m is f for f in found)]


def test_each_stands_where_its_paper_puts_it():
    assert sites("cbam", "resnet18") == [f"layer{s}.{b}.cbam" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert sites("gc", "resnet18") == [f"layer{s}.{b}.gc" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert sites("gsop", "resnet50") == ["layer1.2.gsop", "layer2.3.gsop", "layer3.5.gsop", "layer4.2.gsop"]
    assert sites("a2", "resnet50") == [f"layer{s}.{b}_a2" for s, b in ((2, 1), (2, 3), (3, 1), (3, 3), (3, 5))]
    assert sites("non-local", "resnet50") == ["layer3.4_non_local"]
    assert sites("aa", "resnet50") == [
        f"layer{s}.{b}.conv2" for s, depth in ((2, 4), (3, 6), (4, 3)) for b in range(depth)
    ]
    assert sites("aa", "resnet20") == [f"layer{s}.{b}.conv1" for s in (2, 3) for b in range(3)]


def test_gsop_keeps_the_last_resolution():
    model = ecanet.create_model("resnet18", attention="gsop")
    sizes = []
    model.layer4.register_forward_hook(lambda module, args, out: sizes.append(out.shape[2:]))
    model(torch.zeros(1, 3, 64, 64))
    assert sizes == [(4, 4)]  # 2 x 2 in a plain ResNet


@pytest.mark.parametrize("attention", ["a2", "non-local"])
def test_inserted_blocks_leave_the_other_names_alone(attention):
    """A new network of these computes what the plain one does, so plain weights serve it."""
    plain = ecanet.create_model("resnet20", attention="none", num_classes=10)
    model = ecanet.create_model("resnet20", attention=attention, num_classes=10)
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(x), plain.eval()(x))


# Millions of parameters that the papers' tables print for these networks, and how far our count may lie from them.
PRINTED = {
    ("cbam", "resnet50"): (26.77 * 2**20 / 1e6, 0.006),
    ("cbam", "resnet101"): (47.01 * 2**20 / 1e6, 0.006),
    ("gc", "resnet50"): (28.08, 0.03),  # biases and norms: ours has them all
    ("a2", "resnet50"): (33.00, 0.11),  # theirs has norms of its own
    ("aa", "resnet50"): (25.80, 0.03),
    ("aa", "resnet101"): (45.40, 0.05),
    ("gsop", "resnet50"): (28.05, 0.24),  # biases, and how many numbers a row gives, are not all printed
}


@pytest.mark.parametrize(("attention", "name"), PRINTED)
def test_parameters_beside_the_printed_ones(attention, name):
    printed, slack = PRINTED[attention, name]
    with torch.device("meta"):
        model = ecanet.create_model(name, attention=attention)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - printed) < slack


def test_cost_of_cbam():
    cost = count(CBAM(32), (32, 4, 4))
    assert cost.macs == 2 * 2 * 32 * 2 + 16 * 2 * 49
    layers = (2 * 2 - 1) * 32 + 16 * 2 * 49  # one module called twice counts once, as in 2019
    assert cost.operations == 32 * (16 + 1) + (2 * 32 - 1) * 2 + layers


def small(attention: str, name: str = "resnet14") -> nn.Module:
    torch.manual_seed(0)
    options = {"reduction": 4} if attention in ("cbam", "gc") else {}
    return ecanet.create_model(name, attention=attention, num_classes=10, in_channels=1, **options)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Losses of ``steps`` steps on batches of 64; after the first, every parameter must have a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        at = torch.arange(64 * step, 64 * (step + 1)) % len(images)
        loss = F.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("attention", OTHERS)
def test_trains_on_digits(attention):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    losses = train(
        small(attention, "resnet14" if attention == "gsop" else "resnet8"), images, torch.tensor(digits.target), 30
    )
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("attention", OTHERS)
def test_trains_on_fashion_mnist(attention):
    """10,000 images, once."""
    images, labels = fashion_mnist(10_000)
    losses = train(small(attention), images, labels, 156)
    assert sum(losses[-20:]) / 20 < 0.4 * losses[0]


def fashion_mnist(n: int) -> tuple[Tensor, Tensor]:
    import gzip
    from pathlib import Path

    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    pixels = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16 : 16 + n * 784]
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8 : 8 + n]
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(n, 1, 28, 28).float() / 255 - 0.3
    return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"reduction 16 leaves 1 of 16 channels.*try reduction=8 or less"):
        GlobalContext(16)
    with pytest.raises(ConfigError, match="CBAM takes"):
        CBAM(8)(torch.zeros(1, 8, 5))
    with pytest.raises(ConfigError, match=r"NonLocal\(channels=8\) got 6 channels"):
        NonLocal(8)(torch.zeros(1, 6, 5, 5))
    with pytest.raises(ConfigError, match="fewer than the 8 channels, got 8"):
        ecanet.make_attention("aa", 8)
    with pytest.raises(ConfigError, match=r"takes \(N, 3, H, W\)"):
        AugmentedConv2d(3, 16)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="place in ResNets only"):
        ecanet.create_model("mobilenet_v2", attention="a2")
    with pytest.raises(ConfigError, match="'cbam' has no option 'kernel_size'"):
        ecanet.create_model("resnet20", attention="cbam", kernel_size=5)
    with pytest.raises(AttachError, match="replaces 3x3 convolutions"):
        ecanet.make_attention("aa", 16).neutralize()
