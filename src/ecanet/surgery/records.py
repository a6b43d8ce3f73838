"""The record of one attached gate: where it acts, what attach did for it, and what its proof showed."""

from typing import Literal, cast

from torch import nn

from ecanet.attention import CBAM
from ecanet.surgery.graphs import Moved

Mode = Literal["call", "append", "replace", "node"]
"""The way in which a gate acts: called behind a module by the block's class, as the last entry of a Sequential, in the
place of a module, or as a node of a `torch.fx` graph."""


class Record:
    """The changes that `attach` made for one gate; kept on the gate as ``gate.attachment``, and copied with it."""

    def __init__(
        self, attention: str, target: str, mode: Mode, *, lossless: bool, channels: int, axis: int = 1
    ) -> None:
        self.attention = attention
        """Name of the attention, or of the user's class."""
        self.channels = channels
        self.axis = axis
        """Axis of the channels in the output of the target."""
        self.shape: tuple[int, ...] = ()
        """Spatial shape of the example at this place."""
        self.target = target
        """Name of the module on whose output the gate acts, relative to the block that keeps the gate; "" is the block
        itself."""
        self.mode: Mode = mode
        self.lossless = lossless
        self.runs: int | None = None
        """How often the gate ran in one forward of the example when attach proved it; None without a proof."""
        self.acts: int | None = None
        """How often the gate was called behind its target; counted during the proof only, else None."""
        self.note = ""
        """What the report says about this gate besides."""
        self.affine: str | None = None
        """Name, relative to the block, of the norm or convolution right before the gate."""
        self.doubled = False
        """Whether `fold` doubled that norm or convolution, or quadrupled it for CBAM."""
        self.replaced: nn.Module | None = None
        """The module whose place the gate took; not a child, so not in the state dict."""
        self.moved: Moved | None = None
        """What left a graph's module when that module was made of nodes; None where it was a module before."""


def keep_record(gate: nn.Module, record: Record) -> None:
    """Store ``record`` on ``gate`` as a plain attribute: it is copied and pickled, and no part of the state dict."""
    vars(gate)["attachment"] = record


def read_record(module: nn.Module) -> Record | None:
    """Return the record that ``module`` carries if it is an attached gate."""
    record: object = vars(module).get("attachment")
    return record if isinstance(record, Record) else None


def is_folded(gate: nn.Module, record: Record) -> bool:
    """Return whether the layer before ``gate`` is doubled now: `fold` did it, and no file with a gain was loaded."""
    return record.doubled and cast(float, gate.gain) == 1


def find_factor(gate: nn.Module) -> float:
    """Return the factor that `fold` moves into the layer before ``gate``: 2, for each gate that it is."""
    return 4.0 if isinstance(gate, CBAM) else 2.0
