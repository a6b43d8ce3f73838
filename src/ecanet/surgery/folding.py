"""Move the constant 2 of lossless gates into the norm or convolution before them, which leaves the paper's module."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ecanet.attention import ATTENTIONS, CBAM, ChannelAttention
from ecanet.errors import AttachError
from ecanet.surgery.gates import find_gates
from ecanet.surgery.modules import forward_pre_hooks, own_tensors
from ecanet.surgery.records import Record, find_factor, is_folded

Model = TypeVar("Model", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (
    nn.modules.batchnorm._BatchNorm,  # pyright: ignore[reportPrivateUsage]
    nn.GroupNorm,
    nn.LayerNorm,
)


def fold(model: Model) -> Model:
    """Double the layer before each lossless gate and give the gate the paper's form, in place; outputs stay the same.

    ``2 sigmoid(f(mean(b))) b`` becomes ``sigmoid(f(mean(2b) / 2)) 2b``: weight and bias of the norm (or convolution)
    that makes ``b`` are doubled, the gate's first weights halved (unless it does not read ``b``, as ASR), ``gain`` is 1
    and leaves the state dict. CBAM is two gates, so its factor is 4, and the first weights of both are divided by it.
    Powers of two are exact in floating point. All gates are folded, or none.

    Raises:
        AttachError: nothing is attached, or a gate cannot be folded because no norm or convolution of its own precedes
            it; the message names the first.
    """
    found = [item for item in find_gates(model) if item[2].mode != "replace" and not is_folded(*item[1:])]
    if not found:
        raise AttachError("there is no lossless gate to fold; attach first")
    for name, gate, record in found:
        reason = find_obstacle(model, name, gate, record)
        if reason:
            raise AttachError(f"cannot fold {name!r}: {reason}; the model works without folding")
    for name, gate, record in found:
        assert isinstance(gate, ChannelAttention | CBAM)
        if gate.gain == 2:
            factor = find_factor(gate)
            multiply(list_affine_tensors(model.get_submodule(name.rpartition(".")[0]), record), factor)
            multiply(list_first_weights(gate), 1 / factor)
            gate.gain = 1.0
            record.doubled = True
    return model


def unfold(block: nn.Module, gate: nn.Module, record: Record) -> None:
    """Undo in ``block`` what `fold` did to the layer before ``gate``, which is about to be removed."""
    multiply(list_affine_tensors(block, record), 1 / find_factor(gate))


def list_first_weights(gate: ChannelAttention | CBAM) -> list[Tensor]:
    """Return the weights of ``gate`` on what it reads from its input, which scales with the layer before it."""
    if isinstance(gate, CBAM):
        return [gate.fc1.weight, gate.spatial.weight]
    return [next(iter(gate.parameters()))] if gate.reads_means else []


def find_obstacle(model: nn.Module, name: str, gate: nn.Module, record: Record) -> str | None:
    """Return the reason why this gate cannot be folded, or None."""
    if not isinstance(gate, ChannelAttention | CBAM):
        return f"{type(gate).__name__} is neither one gate on channel means nor CBAM"
    if type(gate) not in ATTENTIONS.values():
        return f"{type(gate).__name__} is not from this library, so its first weights may not scale with the means"
    if record.affine is None:
        return "no norm or convolution that runs once is right before it"
    return find_layer_obstacle(model, f"{name.rpartition('.')[0]}.{record.affine}".lstrip("."))


def find_layer_obstacle(model: nn.Module, name: str) -> str | None:
    """Return the reason why the output of the layer called ``name`` cannot be scaled by its weight, or None."""
    layer = model.get_submodule(name)
    frozen = type(layer).__name__.startswith("FrozenBatchNorm")
    if not (type(layer) in CONVOLUTIONS or isinstance(layer, NORMS) or frozen):
        return f"{type(layer).__name__} before it does not scale with its weight"
    if parametrize.is_parametrized(layer) or forward_pre_hooks(layer):
        return f"the weight of {name!r} is computed from other tensors"
    weight = getattr(layer, "weight", None)
    if weight is None:
        return f"{name!r} has no weight"
    owners = [module for module in model.modules() for tensor in own_tensors(module) if tensor is weight]
    return f"{name!r} shares its weight with another module" if len(owners) > 1 else None


def list_affine_tensors(block: nn.Module, record: Record) -> list[Tensor]:
    """Return weight and bias of the layer that `fold` doubles."""
    assert record.affine is not None
    affine = block.get_submodule(record.affine)
    return [t for t in (getattr(affine, "weight", None), getattr(affine, "bias", None)) if t is not None]


@torch.no_grad()
def multiply(tensors: list[Tensor], factor: float) -> None:
    """Multiply each of ``tensors`` by ``factor``, in place."""
    for tensor in tensors:
        tensor.mul_(factor)
