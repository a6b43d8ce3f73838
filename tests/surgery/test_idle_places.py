"""Places that get no gate, because it could not act there in training and in evaluation alike."""

import pytest
import torch
from torch import Tensor, nn

import ecanet
from ecanet.errors import AttachError


class BestAnchors(nn.Module):
    """A detector that adds constants of the best places to what a small network says of these places."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.score = nn.Linear(8, 1)
        self.box = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("anchors", torch.rand(256, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.block(x)).flatten(2).transpose(1, 2)
        best = self.score(x)[..., 0].topk(5).indices
        if self.how == "mask":
            keep = (torch.zeros(256, dtype=torch.bool)).scatter(0, best[0], True)
            return self.box(x[:, keep]) + self.anchors[keep].expand(len(x), -1, -1)
        chosen = x.gather(1, best[..., None].expand(-1, -1, 8))
        if self.how == "embedding":
            return self.box(chosen) + nn.functional.embedding(best, self.anchors)
        return self.box(chosen) + self.anchors[best.int() if self.how == "int32" else best]


@pytest.mark.parametrize("how", ["int64", "int32", "mask", "embedding"])
def test_constants_that_an_index_selects_are_no_shortcut(how):
    model = BestAnchors(how)
    ecanet.attach(model, example=torch.rand(2, 3, 16, 16))
    assert [site.after for site in ecanet.attached(model)] == ["block.2"]


class Encoder(nn.Module):
    """A convolution or two, and a transformer encoder after them."""

    def __init__(self, residual: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x) if self.residual else self.block(x)
        return self.encoder(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("residual", "expected"), [(True, ["block.2"]), (False, ["block.2"])])
def test_layers_that_a_fused_kernel_skips_get_no_gate(residual, expected):
    model = ecanet.attach(Encoder(residual), example=torch.rand(2, 3, 8, 8))
    assert [site.after for site in ecanet.attached(model)] == expected
    assert any("fused kernel" in reason for _, reason in ecanet.attached(model).left_out)
    with pytest.raises(AttachError, match="fused kernel of its TransformerEncoderLayer"):
        ecanet.attach(Encoder(residual), where="encoder.layers.0.linear1", example=torch.rand(2, 3, 8, 8))


class Headless(nn.Module):
    """A classifier whose backbone also pools for another head, which is not there."""

    def __init__(self, returned: bool):
        super().__init__()
        self.returned = returned
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.pooler = nn.AdaptiveAvgPool2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> object:
        x = self.two(self.one(x))
        pooled = self.pooler(x)
        logits = self.head(x.mean((2, 3)))
        return {"logits": logits, "pooled": pooled} if self.returned else logits


@pytest.mark.parametrize(("returned", "pooled"), [(False, False), (True, True)])
def test_a_stage_that_nobody_reads_gets_no_gate(returned, pooled):
    model = ecanet.attach(Headless(returned), example=torch.rand(2, 3, 16, 16))
    assert ("pooler" in [site.after for site in ecanet.attached(model)]) == pooled


class Normed(nn.Module):
    """A residual block whose branch ends with an instance norm, as in image translation."""

    def __init__(self, axes: int, **options: bool):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
        self.conv1, self.conv2, self.norm = conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1), norm(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.conv1(x).relu()))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_means_that_are_zero_get_no_gate(axes):
    x = torch.rand(2, 4, *(8,) * axes)
    with pytest.raises(AttachError, match="instance norm without a bias"):
        ecanet.attach(nn.Sequential(Normed(axes)), example=x)
    for options in ({"affine": True}, {"track_running_stats": True}):
        assert len(ecanet.attached(ecanet.attach(nn.Sequential(Normed(axes, **options)), example=x))) == 1
