"""Make a copy of a network for inference: norms folded, gates computed early, additions and activations in place.

What is changed is planned on a run of the network in float64, done there first, and compared with the network. Then the
same is done in the copy, in the network's own dtypes.
"""

from typing import NamedTuple

import torch
from torch import nn

from ecanet.errors import ConfigError
from ecanet.inference.captured import CapturedNetwork, check_device
from ecanet.inference.changes import Editor
from ecanet.inference.comparison import plan_changes
from ecanet.inference.copying import copy_model

__all__ = ["Optimization", "optimize"]

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Optimization(NamedTuple):
    """What `optimize` did; the attribute ``optimization`` of the copy."""

    folded: list[str]
    """Names of the norms that were folded into the convolutions before them."""
    moved: list[str]
    """Names of the gates that now take their means from the input of the convolution before them."""
    kept: dict[str, str]
    """Names of the other gates, each with the reason."""


def optimize(model: nn.Module, *, example: object = None, graph: bool = False) -> nn.Module:
    """Return a copy of ``model`` for inference, with the same outputs within float rounding; ``model`` is not changed.

    Batch norms are folded into the convolutions before them. Where a gate follows a dense 1x1 convolution with more
    channels out than in, it takes its channel means from that convolution's input, because
    ``mean(W h + b) = W mean(h) + b``: in a bottleneck it then reads a quarter of what it scales. Activations work in
    place where nobody else reads their input, in known residual blocks also gate and addition, and weights are
    channels-last. On a GPU and without gradients, one Triton kernel runs a 1x1 convolution with what follows it (gate,
    addition, activation), after it has passed a check on that GPU. Any other convolution with a ReLU behind it is one
    kernel of cuDNN, where that is right and faster on that GPU (`ops.list_choices`).

    It takes any network that runs on ``example``, with attention or without, built in or attached. What a layer is, is
    seen in a run and by probing, not by its class. The known residual blocks are those of ecanet, torchvision's ResNets
    and MobileNetV2, and timm's ResNets. Layers with hooks, computed weights, shared convolutions and gates of another
    form than squeeze, gate, scale stay as they are. The copy's attribute ``optimization`` says which norms were folded,
    which gates were moved, and why others were not.

    The changes are proven: they are made in a float64 copy too, whose outputs must be the network's but for half of
    their digits. A network that does not run in float64 is compared in its own dtype.

    Args:
        model: any convolutional network.
        example: an input, a tuple of inputs or a dictionary of keyword inputs, for models that do not take a random
            image. The model's copy runs on it, in evaluation mode.
        graph: True wraps the copy, which must be on a CUDA device: its first call without gradients is captured as a
            CUDA graph, and later calls with an input of the same shape, dtype and layout replay that in one launch.
            Other calls run as they are.

    >>> import ecanet
    >>> model = ecanet.create_model("resnet8").eval()
    >>> fast = ecanet.optimize(model)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
    True

    Raises:
        AttachError: ``model`` does not run on the example, or no example can be guessed.
        ConfigError: ``model`` is no network, has no weights yet or nothing to fold or move, or its outputs would
            change; with ``graph`` it is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"optimize takes a network (a torch.nn.Module), got {model!r}")
    if graph:
        check_device(model)
    with torch.inference_mode(False):
        plan = plan_changes(model, example)
        result = copy_model(model)
        Editor(result).apply(plan)
    for tensor in (*result.parameters(), *result.buffers()):
        if tensor.dim() in FORMATS and tensor.layout == torch.strided:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[tensor.dim()])
    moved = [chain.gate for chain in plan.chains if chain.gate]
    result = CapturedNetwork(result) if graph else result
    vars(result)["optimization"] = Optimization([c.norm for c in plan.chains if c.norm], moved, plan.kept)
    return result.eval()
