"""Blocks whose classes have other bases than nn.Module, or a metaclass: their class is exchanged all the same."""

import copy
import pickle
from abc import ABC, ABCMeta
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from torch import fx, nn

import ecanet

IMAGES = torch.rand(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
Kind = TypeVar("Kind")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.norm(self.conv2(self.conv1(x).relu()))


class Plain:
    pass


class Slots:
    __slots__ = ()


class HasForward(Protocol):
    def forward(self, x): ...


class PlainFirst(Plain, Block):
    pass


class AbstractFirst(ABC, Block):
    pass


class AbstractLast(Block, ABC):
    pass


class GenericFirst(Generic[Kind], Block):
    pass


class OfIntegers(GenericFirst[int]):
    pass


class ProtocolFirst(HasForward, Block):
    def forward(self, x):
        return Block.forward(self, x)


class SlotsFirst(Slots, Block):
    pass


class WithMetaclass(Block, metaclass=ABCMeta):
    pass


CLASSES = [
    PlainFirst,
    AbstractFirst,
    AbstractLast,
    GenericFirst,
    OfIntegers,
    ProtocolFirst,
    SlotsFirst,
    WithMetaclass,
]


class Network(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.second = kind(), kind()

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("kind", CLASSES)
def test_blocks_with_other_first_bases_get_gates(kind):
    torch.manual_seed(0)
    model = Network(kind).eval()
    plain = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    assert [site.name for site in ecanet.attached(model)] == ["first.eca", "second.eca"]
    assert torch.equal(model(IMAGES), plain)
    assert isinstance(model.first, kind)
    for site in ecanet.attached(model):
        nn.init.normal_(model.get_submodule(site.name).conv.weight)
    expected = IMAGES
    for block in (model.first, model.second):
        branch = block.norm(block.conv2(block.conv1(expected).relu()))
        expected = expected + block.eca(branch)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fx.symbolic_trace(model)):
        assert torch.equal(same(IMAGES), expected)
    with pytest.warns(UserWarning, match="not neutral"):
        ecanet.detach(model)
    assert type(model.first) is kind
    assert torch.equal(model(IMAGES), plain)


@pytest.mark.parametrize("kind", [AbstractFirst, GenericFirst])
def test_a_block_takes_gates_again_after_it_lost_them(kind):
    model = Network(kind).eval()
    plain = model(IMAGES)
    for _ in range(2):
        ecanet.detach(ecanet.attach(model, example=IMAGES))
    assert not [name for name, _ in model.named_modules() if "eca" in name]
    assert torch.equal(ecanet.attach(model, example=IMAGES)(IMAGES), plain)


def test_such_a_block_compiles_in_one_graph():
    model = ecanet.attach(Network(GenericFirst).eval(), example=IMAGES)
    before = model(IMAGES)
    for site in ecanet.attached(model):  # neutral gates would not be missed
        nn.init.normal_(model.get_submodule(site.name).conv.weight, 0, 5)
    with torch.no_grad():
        assert not torch.allclose(model(IMAGES), before, rtol=1e-2, atol=1e-2)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(IMAGES)
        torch.testing.assert_close(compiled, model(IMAGES))
