"""Carry out a plan in a network: fold norms, run residual blocks by their parts, join convolutions with their gates."""

from typing import Any

from torch import nn

from ecanet.inference.blocks import InferenceBlock, describe_for_copy
from ecanet.inference.chains import Chain, Plan
from ecanet.inference.folding import fold, is_convolution
from ecanet.models import Layer, Parts
from ecanet.surgery import children_of, list_modules, list_records, uninstall


class Editor:
    """Changes the modules of one network."""

    def __init__(self, model: nn.Module):
        self.modules: dict[str, Any] = dict(list_modules(model))
        """The modules by their names before any change; a folded convolution stands under its old name."""
        self.places: dict[nn.Module, list[tuple[dict[str, nn.Module | None], str]]] = {}
        for parent in self.modules.values():
            self.note_children(parent)

    def note_children(self, parent: nn.Module) -> None:
        """Remember that the children of ``parent`` stand there."""
        for key, child in children_of(parent).items():
            if child is not None:
                self.places.setdefault(child, []).append((children_of(parent), key))

    def exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` in every place in which ``old`` stands: a shared module has several."""
        places = self.places.pop(old)
        for children, key in places:
            children[key] = new
        self.places[new] = places

    def apply(self, plan: Plan) -> None:
        """Do what ``plan`` says."""
        for name in plan.inplace:
            self.modules[name].inplace = True
        for chain in plan.chains:
            self.fold(chain)
        for name in plan.blocks:
            parts = describe_for_copy(self.modules[name])
            assert parts is not None
            self.exchange(self.modules[name], InferenceBlock(parts))
        for chain in plan.chains:
            if not chain.in_block and (chain.gate is not None or chain.activation is not None):
                self.join(chain)

    def fold(self, chain: Chain) -> None:
        """Fold the norm of ``chain`` into its convolution; what the norm's own forward calls besides stays there."""
        convolution = self.modules[chain.convolution]
        if chain.norm is None or chain.affine is None or not is_convolution(convolution):
            return
        self.modules[chain.convolution] = fold(convolution, chain.affine)
        self.exchange(convolution, self.modules[chain.convolution])
        rest = nn.Sequential(*(self.modules[name] for name in chain.rest))
        self.note_children(rest)
        self.exchange(self.modules[chain.norm], rest if chain.rest else nn.Identity())

    def join(self, chain: Chain) -> None:
        """Make one block of a convolution, its gate and its activation, in the convolution's place."""
        convolution, gate, end = self.modules[chain.convolution], None, nn.Identity()
        if chain.activation is not None:
            end = self.modules[chain.activation]
            self.exchange(end, nn.Identity())
        if chain.gate is not None:
            gate = self.modules[chain.gate]
            keeper, _, key = chain.gate.rpartition(".")
            if key in list_records(self.modules[keeper]):
                uninstall(self.modules[keeper], key)
            else:
                self.exchange(gate, nn.Identity())
        self.exchange(convolution, InferenceBlock(Parts((Layer(convolution, None, None),), gate, None, end)))
