"""The base classes of all attention modules: they keep the shape of their input and can be made the identity."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.errors import AttachError, CheckpointError, ConfigError, check_positive_int


class Attention(nn.Module):
    """An attention module: it maps (N, C, ...) to the same shape."""

    channels: int
    """Number of channels C, axis 1 of the input."""

    fits_any_width: ClassVar[bool] = False
    """True if no weight belongs to a channel: after pruning such a module goes on when `channels` is set anew."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            """Call `forward` and the hooks; nn.Module's own signature returns Any."""
            ...

    def neutralize(self) -> None:
        """Make this module the identity, bit for bit; its parameters still get gradients.

        Raises:
            AttachError: this attention cannot be the identity.
        """
        raise AttachError(
            f"{type(self).__name__} defines no neutralize(), so it cannot be inserted losslessly; pass preserve=False"
        )

    def check_float(self, x: Tensor) -> None:
        """Check that ``x`` is not quantized, as the tensors of a network are after `torch.ao.quantization.convert`.

        Raises:
            ConfigError: it is.
        """
        if not ops.is_traced(x) and x.is_quantized:
            raise ConfigError(
                f"{type(self).__name__} runs in float, got a quantized tensor ({x.dtype}); put a DeQuantStub before "
                f"and a QuantStub after it, or quantize with PT2E (torch.export)"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which calls this method first.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"torch.jit.script cannot read {type(self).__name__}; use torch.export.export or torch.jit.trace, or "
            f"script the graph of torch.fx.symbolic_trace"
        )

    def check_channels(self, x: Tensor) -> None:
        """Check that axis 1 of ``x`` has this module's channels, in float; a tensor traced by torch.fx passes.

        Raises:
            ConfigError: it has another number of channels, or is quantized.
        """
        if ops.is_traced(x):
            return
        self.check_float(x)
        if x.dim() >= 2 and x.shape[1] != self.channels:
            remedy = f"set its channels to {x.shape[1]}" if self.fits_any_width else "prune its weights too"
            raise ConfigError(
                f"{type(self).__name__}(channels={self.channels}) got {x.shape[1]} channels "
                f"(shape {tuple(x.shape)}); channels are axis 1; if the network was pruned, {remedy}, or detach and "
                f"attach again"
            )


class GatedAttention(Attention):
    """An attention that multiplies its input by gates, each with the constant factor ``gain``.

    A gain of 1 is the paper's form. A gain of 2 is the lossless form, in which a gate with zeroed last weights is
    ``2 * sigmoid(0) = 1`` exactly. The gain is a plain number, in the state dict only when it is not 1.
    """

    gain: float

    def __init__(self, channels: int):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        # A buffer would lose its value in `to_empty`, and stay on the meta device when a file does not hold it.
        self.gain = 1.0

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the last layers: when all are zero, a gate is sigmoid(0) for any input.

        Raises:
            AttachError: the class does not define them.
        """
        raise AttachError(
            f"{type(self).__name__} defines no last_parameters(), which give a gate of sigmoid(0) when zero, so it "
            f"cannot be inserted losslessly; define it, or pass preserve=False"
        )

    def neutralize(self) -> None:
        """Make this module the identity, bit for bit: zero the last layers and set the gain to 2.

        Raises:
            AttachError: the gate has no parameters to zero (SE-Var1).
        """
        zero(self.last_parameters())
        self.gain = 2.0

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Write the gain if it is not 1, as a number on the CPU wherever the parameters are."""
        save = cast("Callable[..., None]", super()._save_to_state_dict)  # pyright: ignore[reportUnknownMemberType]
        save(destination, prefix, keep_vars)
        if self.gain != 1:
            destination[prefix + "gain"] = torch.tensor(self.gain, dtype=torch.float32, device="cpu")

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Take the gain from the file; weights without a gain mean 1. A file without both leaves the gain as it is."""
        # Removed, because PyTorch calls a key unexpected that is neither a parameter nor a buffer.
        value = state_dict.pop(prefix + "gain", None)
        if value is not None and not is_stand_in(value):
            self.gain = read_gain(prefix + "gain", value)
        elif any(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.gain = 1.0
        load = cast("Callable[..., None]", super()._load_from_state_dict)  # pyright: ignore[reportUnknownMemberType]
        load(state_dict, prefix, *args, **kwargs)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and buffers; without ``recurse`` also a stand-in for the gain, if the state dict has it.

        `torch.distributed.checkpoint` asks each module in this way for the keys that it renames (under
        DistributedDataParallel) and sends to other processes (``broadcast_from_rank0``). It keeps the stand-in where a
        file has no gain.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse and self.gain != 1:
            yield f"{prefix}.gain".lstrip("."), torch.tensor(False, device="cpu")

    def extra_repr(self) -> str:
        """Return the channel count, and the gain when it is not the paper's."""
        return f"{self.channels}" + (f", gain={self.gain:g}" if self.gain != 1 else "")


def is_stand_in(value: object) -> bool:
    """Return whether ``value`` is what `GatedAttention.named_buffers` yields for a gain, and not from a file."""
    return isinstance(value, Tensor) and value.dtype == torch.bool


def read_gain(key: str, value: object) -> float:
    """Return the number that a file holds under ``key``.

    Raises:
        CheckpointError: it is not one finite number.
    """
    try:
        gain = float(cast(float, value))
    except (TypeError, ValueError, RuntimeError):  # text, several numbers, or a tensor on the meta device
        gain = math.nan
    if not math.isfinite(gain):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else repr(value)
        raise CheckpointError(f"{key!r} must be one finite number, got {found}; the file is damaged, load another one")
    return gain


@torch.no_grad()
def zero(parameters: Iterable[Tensor]) -> None:
    """Set every one of ``parameters`` to zero."""
    for parameter in parameters:
        parameter.zero_()
