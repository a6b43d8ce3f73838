"""What every attention module of this library is: a shape-keeping module that can be made the identity."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.errors import AttachError, ConfigError, check_positive_int


class Attention(nn.Module):
    """What a slot of a network can hold: (N, C, ...) in, the same shape out."""

    channels: int

    def neutralize(self) -> None:
        """Become the identity, bit for bit, with gradients that flow.

        Raises:
            AttachError: this attention has no parameters to zero.
        """
        raise AttachError(
            f"{type(self).__name__} defines no neutralize(), so it cannot be inserted losslessly; pass preserve=False"
        )

    def check_channels(self, x: Tensor) -> None:
        """Raise ConfigError unless axis 1 of ``x`` has this module's channels; a tensor traced by torch.fx passes."""
        if not ops.is_traced(x) and x.dim() >= 2 and x.shape[1] != self.channels:
            raise ConfigError(
                f"{type(self).__name__}(channels={self.channels}) got {x.shape[1]} channels "
                f"(shape {tuple(x.shape)}); channels are axis 1"
            )


class Gated(Attention):
    """An attention that multiplies by gates, each with the constant factor ``gain``.

    1 is the paper's form; 2 is the lossless one, in which a gate with zeroed last weights is ``2 * sigmoid(0) = 1``
    exactly. It is a buffer, in the state dict only when it is not 1.
    """

    gain: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        self.set_gain(1.0)

    def last(self) -> Iterable[Tensor]:
        """The parameters of the gates' last layers: all zero means that a gate is sigmoid(0) for any input."""
        raise AttachError(
            f"{type(self).__name__} defines no last(), the parameters that give a gate of sigmoid(0) when zero, so it "
            f"cannot be inserted losslessly; define it, or pass preserve=False"
        )

    def set_gain(self, gain: float) -> None:
        """Make the constant factor ``gain``; it enters the state dict unless it is 1."""
        device = next((p.device for p in self.parameters()), None)
        self.register_buffer("gain", torch.tensor(float(gain), device=device), persistent=gain != 1)

    def neutralize(self) -> None:
        """Make this module the identity, bit for bit, with gradients that flow: zero last layer, gain 2.

        Raises:
            AttachError: the gate has no parameters to zero (SE-Var1).
        """
        zero(self.last())
        self.set_gain(2.0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Take ``gain`` from the file; weights without it mean 1; neither leaves the gate as it is."""
        if prefix + "gain" in state_dict:
            self.set_gain(float(state_dict[prefix + "gain"]))
        elif any(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.set_gain(1.0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the channel count, and the gain when it is not the paper's."""
        gain = 1.0 if self.gain.is_meta else float(self.gain)
        return f"{self.channels}" + (f", gain={gain:g}" if gain != 1 else "")


@torch.no_grad()
def zero(parameters: Iterable[Tensor]) -> None:
    """Set every one of ``parameters`` to zero."""
    for parameter in parameters:
        parameter.zero_()
