"""Make the copy of a network that is exported: norms folded, every gate in the form of the target."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from ecanet import inference
from ecanet.attention import Attention, AugmentedConv2d
from ecanet.deploy.cbam_form import ExportedCBAM
from ecanet.deploy.forms import ExportedGate, Form, build_gate
from ecanet.errors import AttachError, ConfigError
from ecanet.models import is_pointwise
from ecanet.surgery import attached, fold

__all__ = [
    "WRAPPERS",
    "Prepared",
    "copy_unwrapped",
    "count_attention",
    "prepare",
    "remove_attention",
    "unwrap",
    "unwrap_inside",
]

AS_IT_IS = "as it is"

WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Names of the classes that hold a network as it is, and of their attribute that does."""


class Prepared(NamedTuple):
    """A copy of a network for export."""

    network: nn.Module
    gates: dict[str, int]
    """How many gates have which form; "as it is" counts the attention modules that have none."""


class EarlyGate(nn.Module):
    """A 1 x 1 convolution and the gate behind it, which takes its means from the narrow input of the convolution.

    ``mean(W h + b) = W mean(h) + b``, so the same convolution turns the means of its input into those of its output.
    """

    def __init__(self, convolution: nn.Conv2d, gate: ExportedGate):
        super().__init__()
        self.convolution, self.gate = convolution, gate

    def forward(self, h: Tensor) -> Tensor:
        """Return the gated output: (N, C, H, W) -> (N, C', H, W)."""
        return self.convolution(h) * self.gate.weigh(self.convolution(h.mean((2, 3), keepdim=True)))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network that torch.compile, DataParallel or DistributedDataParallel has wrapped as a whole.

    Raises:
        ConfigError: the wrapper has a hook, which would be lost.
    """
    while (attribute := WRAPPERS.get(type(model).__name__)) is not None:
        if any(vars(model).get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            raise ConfigError(f"{type(model).__name__} has a hook, which would be lost; remove it first")
        model = cast(nn.Module, getattr(model, attribute))
    return model


def copy_unwrapped(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in evaluation and without gradients, in which nothing is compiled or wrapped.

    Raises:
        ConfigError: it cannot be copied, or a wrapper has a hook.
    """
    return unwrap_inside(inference.copy_model(unwrap(model)))


def unwrap_inside(model: nn.Module) -> nn.Module:
    """Unwrap what is compiled or wrapped inside of ``model``, and return it.

    Raises:
        ConfigError: a wrapper has a hook.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in WRAPPERS:
                setattr(parent, name, unwrap(child))
    return model


def prepare(model: nn.Module, form: Form, *, early: bool) -> Prepared:
    """Return a copy of ``model`` in evaluation with folded norms and with gates of the form ``form``.

    ``early`` takes a gate's means before the last convolution of its block where they are fewer there.

    The factor 2 of lossless gates is moved into the layers before them where `ecanet.fold` can do so.
    """
    network = inference.copy_model(model)
    if attached(network):
        with suppress(AttachError):  # a site without an affine of its own: its gate keeps one more multiplication
            fold(network)
    with suppress(AttachError, ConfigError):  # nothing to fold, or a network that takes no random image
        network = inference.optimize(network)
    counts: Counter[str] = Counter()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Attention):
                continue
            gate = build_gate(child, form)
            counts[AS_IT_IS if gate is None else form] += 1
            if gate is not None:
                put_gate(parent, name, gate, early=early)
    # Channels-last weights are for PyTorch's own convolutions. contiguous() would leave the strides of a 1 x 1 kernel
    # as they are, from which a recorded pooling takes its layout, in steps that compute the batch size.
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return Prepared(network, dict(counts))


def put_gate(parent: nn.Module, name: str, gate: ExportedGate | ExportedCBAM, *, early: bool) -> None:
    """Put ``gate`` in the place of the child ``name``, or ``early`` around the convolution that widens before it."""
    last = parent.branch[-1] if isinstance(parent, inference.InferenceBlock) and name == "attention" else None
    # CBAM has maxima, and they are not those before the convolution.
    if early and isinstance(parent, inference.InferenceBlock) and isinstance(gate, ExportedGate) and widens(last):
        parent.branch[-1] = EarlyGate(last, gate)
        parent.attention = None
    else:
        setattr(parent, name, gate)


def widens(convolution: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return whether ``convolution`` is a 1 x 1 convolution with more channels out than in."""
    return convolution is not None and is_pointwise(convolution) and convolution.in_channels < convolution.out_channels


def find_attention(model: nn.Module) -> list[str]:
    """Return the names of the attention modules whose removal leaves a plain network.

    The attention-augmented convolution is a convolution itself, so it stays.
    """
    return [
        name
        for name, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
        if name and isinstance(module, Attention) and not isinstance(module, AugmentedConv2d)
    ]


def count_attention(model: nn.Module) -> int:
    """Return the number of the attention modules that `remove_attention` takes out."""
    return len(find_attention(model))


def remove_attention(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which every attention module is the identity: the plain network."""
    plain = inference.copy_model(model)
    for name in find_attention(plain):
        parent, _, key = name.rpartition(".")
        setattr(plain.get_submodule(parent), key, nn.Identity())
    return plain
