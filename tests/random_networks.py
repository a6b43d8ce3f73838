"""Random small networks for the tests of `attach`: a plan says what to build, `build` builds it.

A plan is a frozen value, so that a failing example prints as one line that builds the same network again. The plans
cover what other people's networks do: additions in every form, in-place operations, shared modules, branches that are
concatenated, split or sliced, blocks with and without norms, one to three spatial axes, and odd widths.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Kind = Literal["residual", "plain", "concatenated", "split", "sliced", "channels_end"]
Norm = Literal["none", "batch", "group", "instance"]
Addition = Literal["x + y", "y + x", "y += x", "x += y", "torch.add"]
Activation = Literal["none", "relu", "relu_", "silu"]
Head = Literal["classes", "maps", "list", "dict"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class BlockPlan:
    """One block: what it computes, and how its forward is written."""

    kind: Kind = "residual"
    norm: Norm = "batch"
    last_norm: bool = True
    addition: Addition = "x + y"
    activation: Activation = "relu"
    out_width: int | None = None  # None keeps the width
    stride: int = 1
    dropout: float = 0.0
    sequential: bool = False  # the branch is one nn.Sequential instead of several attributes
    nested: bool = False  # a residual block inside the branch
    runs: int = 1  # the same module runs this often in a row

    def keeps_shape(self, width: int) -> bool:
        """Return whether input and output of the block have the same shape."""
        return self.stride == 1 and self.out_width in (None, width) and self.kind != "sliced"


@dataclass(frozen=True)
class NetworkPlan:
    """A network of blocks, and the batch that it runs on."""

    blocks: tuple[BlockPlan, ...]
    axes: int = 2
    width: int = 5
    size: int = 8
    batch: int = 2
    head: Head = "classes"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    seed: int = 0


def norm(kind: Norm, axes: int, width: int) -> nn.Module:
    """Return a norm for (N, width, ...) with ``axes`` spatial axes, or the identity."""
    match kind:
        case "batch":
            return BATCH_NORMS[axes - 1](width)
        case "group":
            return nn.GroupNorm(1, width)
        case "instance":
            return INSTANCE_NORMS[axes - 1](width, affine=True)
        case "none":
            return nn.Identity()


def activation(kind: Activation) -> nn.Module:
    """Return the module that computes ``kind``; "relu_" works in place."""
    modules: dict[Activation, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "relu_": lambda: nn.ReLU(inplace=True),
        "silu": nn.SiLU,
    }
    return modules[kind]()


def convolution(axes: int, width: int, out: int, kernel_size: int, stride: int = 1, bias: bool = True) -> nn.Module:
    """Return a padded convolution over ``axes`` spatial axes."""
    return CONVOLUTIONS[axes - 1](width, out, kernel_size, stride, padding=kernel_size // 2, bias=bias)


def project_size(stride: int) -> int:
    """Return the size of a projection's kernel: 1, or 3 with a stride.

    On a CPU, the backward pass of PyTorch 2.15 writes beyond the memory of a channels-last tensor where a 1x1
    convolution with a stride has fewer than 8 channels.
    """
    return 1 if stride == 1 else 3


def add(x: Tensor, y: Tensor, form: Addition) -> Tensor:
    """Return the sum of the shortcut ``x`` and the branch ``y``, written as ``form`` says."""
    match form:
        case "x + y":
            return x + y
        case "y + x":
            return y + x
        case "torch.add":
            return torch.add(y, x)
        case "y += x":
            y += x
            return y
        case "x += y":
            x = x.clone()  # the shortcut itself is saved for the backward pass of the block before
            x += y
            return x


class Branch(nn.Module):
    """Two convolutions with an activation between them; norms, dropout and an inner residual block where planned."""

    def __init__(self, plan: BlockPlan, axes: int, width: int, out: int):
        super().__init__()
        bias = plan.norm == "none"
        self.conv1 = convolution(axes, width, out, 3, plan.stride, bias)
        self.norm1 = norm(plan.norm, axes, out)
        self.act = activation("relu_" if plan.activation == "relu_" else "relu")
        self.inner = Block(BlockPlan(norm=plan.norm, addition=plan.addition), axes, out) if plan.nested else None
        self.conv2 = convolution(axes, out, out, 3, 1, bias or not plan.last_norm)
        self.norm2 = norm(plan.norm, axes, out) if plan.last_norm else None
        self.dropout = nn.Dropout(plan.dropout) if plan.dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        if self.inner is not None:
            y = self.inner(y)
        y = self.conv2(y)
        if self.norm2 is not None:
            y = self.norm2(y)
        return y if self.dropout is None else self.dropout(y)


class ChannelsEnd(nn.Module):
    """A branch that computes on (N, ..., C), as in ConvNeXt: depthwise convolution, layer norm, two linear layers."""

    def __init__(self, axes: int, width: int, out: int):
        super().__init__()
        self.depthwise = CONVOLUTIONS[axes - 1](width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return self.linear2(torch.nn.functional.gelu(self.linear1(y))).movedim(-1, 1)


class Concatenated(nn.Module):
    """Two branches side by side, concatenated and mixed by a 1x1 convolution, as in Inception."""

    def __init__(self, plan: BlockPlan, axes: int, width: int, out: int):
        super().__init__()
        self.left = Branch(plan, axes, width, out)
        self.right = nn.Sequential(convolution(axes, width, 3, project_size(plan.stride), plan.stride), nn.ReLU())
        self.project = convolution(axes, out + 3, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([self.left(x), self.right(x)], 1))


class Block(nn.Module):
    """One block of a network: a branch, and whatever joins it with the input."""

    def __init__(self, plan: BlockPlan, axes: int, width: int):
        super().__init__()
        self.plan = plan
        self.half = width // 2  # channels that a "split" block leaves as they are
        width, out = (width - self.half,) * 2 if plan.kind == "split" else (width, plan.out_width or width)
        self.branch = self.build_branch(plan, axes, width, out)
        projects = plan.kind not in ("plain", "split") and (plan.stride > 1 or out != width)
        self.project = convolution(axes, width, out, project_size(plan.stride), plan.stride) if projects else None
        self.act = activation(plan.activation)

    @staticmethod
    def build_branch(plan: BlockPlan, axes: int, width: int, out: int) -> nn.Module:
        """Return the branch that ``plan`` asks for."""
        if plan.kind == "channels_end":
            return ChannelsEnd(axes, width, out)
        if plan.kind == "concatenated":
            return Concatenated(plan, axes, width, out)
        branch = Branch(plan, axes, width, out)
        if plan.sequential:
            return nn.Sequential(*(child for child in branch.children() if not isinstance(child, nn.Identity)))
        return branch

    def forward(self, x: Tensor) -> Tensor:
        if self.plan.kind == "sliced":
            x = x[..., ::2]  # not dense: the next operation sees a stride of 2
        if self.plan.kind == "plain":
            return self.act(self.branch(x))
        if self.plan.kind == "split":
            kept, changed = x.split([self.half, x.shape[1] - self.half], 1)
            return torch.cat([kept, self.act(changed + self.branch(changed))], 1)
        shortcut = x if self.project is None else self.project(x)
        return self.act(add(shortcut, self.branch(x), self.plan.addition))


class Network(nn.Module):
    """A stem, the planned blocks, and a head."""

    def __init__(self, plan: NetworkPlan):
        super().__init__()
        self.plan = plan
        self.stem = convolution(plan.axes, 3, plan.width, 3)
        width, blocks = plan.width, list[Block]()
        for block in plan.blocks:
            blocks.append(Block(block, plan.axes, width))
            width = width if block.kind == "split" else block.out_width or width
        self.blocks = nn.ModuleList(blocks)
        self.classify = nn.Linear(width, 4) if plan.head == "classes" else None

    def forward(self, image: Tensor) -> object:
        x, maps = self.stem(image), list[Tensor]()
        for block in self.blocks:
            for _ in range(block.plan.runs):
                x = block(x)
            maps.append(x)
        match self.plan.head:
            case "classes":
                assert self.classify is not None
                return self.classify(x.flatten(2).mean(2))
            case "maps":
                return x
            case "list":
                return maps
            case "dict":
                return {"first": maps[0], "last": x}


def build(plan: NetworkPlan) -> tuple[nn.Module, Tensor]:
    """Return the network of ``plan`` with random parameters and running statistics, and a batch for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = Network(plan)
        image = torch.randn(plan.batch, 3, *(plan.size,) * plan.axes)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.dim() == 1:
                    tensor.uniform_(-0.3, 0.3)
    network, image = network.to(plan.dtype), image.to(plan.dtype)
    if plan.channels_last:
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}[plan.axes]
        network, image = network.to(memory_format=layout), image.contiguous(memory_format=layout)
    return network, image


@st.composite
def plans(draw: st.DrawFn) -> NetworkPlan:
    """Draw a plan of one to three blocks."""
    axes = draw(st.sampled_from([2, 2, 2, 1, 3]))
    size = start_size = draw(st.integers(8, 12) if axes < 3 else st.integers(6, 7))
    width = start_width = draw(st.integers(2, 9))
    blocks: list[BlockPlan] = []
    for _ in range(draw(st.integers(1, 3))):
        block = draw(block_plans(width, can_shrink=size >= 6))  # an instance norm needs more than one position
        blocks.append(block)
        width = width if block.kind == "split" else block.out_width or width
        size = (size + 1) // 2 if block.kind == "sliced" or block.stride == 2 else size
    return NetworkPlan(
        blocks=tuple(blocks),
        axes=axes,
        width=start_width,
        size=start_size,
        batch=draw(st.integers(2, 3)),
        head=draw(st.sampled_from(["classes", "maps", "list", "dict"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])),
        channels_last=axes > 1 and draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def block_plans(draw: st.DrawFn, width: int, *, can_shrink: bool) -> BlockPlan:
    """Draw a block that takes ``width`` channels, of half the resolution only if ``can_shrink``."""
    kinds = ["residual", "residual", "residual", "plain", "concatenated", "channels_end"]
    kinds += ["sliced"] * can_shrink + ["split"] * (width >= 4)
    kind: Kind = draw(st.sampled_from(kinds))
    strides = can_shrink and kind in ("residual", "plain", "concatenated")
    block = BlockPlan(
        kind=kind,
        norm=draw(st.sampled_from(["batch", "batch", "group", "instance", "none"])),
        last_norm=draw(st.booleans()),
        addition=draw(st.sampled_from(["x + y", "y + x", "y += x", "x += y", "torch.add"])),
        activation=draw(st.sampled_from(["none", "relu", "relu_", "silu"])),
        out_width=draw(st.none() | st.integers(2, 9)) if kind != "split" else None,
        stride=draw(st.integers(1, 2)) if strides else 1,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.2])),
        sequential=draw(st.booleans()),
        nested=draw(st.booleans()) and kind != "channels_end",
    )
    if block.keeps_shape(width) and draw(st.booleans()):
        block = replace(block, runs=2)
    return block
