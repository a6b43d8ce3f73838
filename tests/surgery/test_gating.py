"""How an attached gate acts in its block: once for each call of the module at its place, whoever stands there."""

import copy
import functools
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models import mobilenet_v2, resnet18, squeezenet1_1, vgg11

import ecanet
from ecanet.errors import AttachError, EcanetError

IMAGES = torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block whose forward looks at its norm, too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.seen = ()

    def forward(self, x):
        self.seen = (isinstance(self.norm, nn.BatchNorm2d), getattr(self.norm, "num_features", None), bool(self.norm))
        return x + self.norm(self.conv2(self.conv1(x).relu()))

    def forward_twice(self, x):
        return x + 2 * self.norm(self.conv2(self.conv1(x).relu()))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


def trained(model=None):
    """Return an attached network whose gates do something."""
    torch.manual_seed(0)
    model = ecanet.attach((model or Network()).eval())
    for site in ecanet.attached(model):
        nn.init.normal_(model.get_submodule(site.name).conv.weight)
    return model


def by_hand(block, x, factor=1):
    """Compute the block from its parts, with the gate in its place."""
    return x + factor * block.eca(block.norm(block.conv2(block.conv1(x).relu())))


def test_the_block_sees_its_gated_norm_and_others_see_the_norm():
    model = trained()
    block = model.block
    assert torch.equal(model(IMAGES), by_hand(block, IMAGES))
    assert block.seen == (True, 8, True)
    assert type(block.norm) is nn.BatchNorm2d
    assert not block.norm._forward_hooks
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert "eca" in dict(block.named_children())


def test_another_gate_in_the_same_place_acts():
    model = trained()
    model.block.eca = copy.deepcopy(model.block.eca).requires_grad_(False)
    nn.init.normal_(model.block.eca.conv.weight)
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    model.block.eca = nn.Identity()
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    del model.block.eca
    with pytest.raises(AttachError, match="'eca' of Block was deleted"):
        model(IMAGES)
    with pytest.raises(AttachError, match=r"'block\.eca' was deleted"):
        ecanet.attached(model)


def test_another_norm_in_the_same_place_is_gated():
    model = trained()
    model.block.norm = nn.GroupNorm(2, 8)
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))


def test_a_new_forward_sees_the_gate():
    model = trained()
    model.block.forward = model.block.forward_twice
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES, 2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), by_hand(model.block, IMAGES, 2))
        other.block.norm = nn.Identity()  # a copy is a block of its own
        assert torch.equal(other(IMAGES), by_hand(other.block, IMAGES, 2))
    model.block.forward = types.MethodType(Block.forward, model.block)
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    model.block.forward = model.block.forward_twice
    del model.block.forward
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    before, calls = model.block.forward, []

    @functools.wraps(before)
    def counted(*args):
        calls.append(1)
        return before(*args)

    model.block.forward = counted
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    assert calls == [1]


class Layer(nn.Module):
    """A layer that is an entry of a Sequential, so that it keeps its own gate."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()

    def forward_fused(self, x):
        return self.conv(x).relu()


def test_a_new_forward_of_a_module_that_keeps_its_own_gate_is_gated():
    model = trained(nn.Sequential(Layer(), Layer()))
    (site,) = ecanet.attached(model)
    layer = model.get_submodule(site.after)
    layer.forward = layer.forward_fused
    del layer.norm
    assert torch.equal(layer(IMAGES), layer.eca(layer.conv(IMAGES).relu()))
    with pytest.warns(UserWarning, match="not neutral"):
        ecanet.detach(model)
    assert type(layer) is Layer
    assert torch.equal(layer(IMAGES), layer.conv(IMAGES).relu()), "the new forward stays"


def test_a_forward_that_was_set_before_is_gated_and_comes_back():
    model = Network().eval()
    own = model.block.forward = types.MethodType(Block.forward_twice, model.block)
    trained(model)
    assert ecanet.attached(model)[0].name == "block.eca"
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES, 2))
    with pytest.warns(UserWarning, match="not neutral"):
        ecanet.detach(model)
    assert vars(model.block)["forward"] == own
    assert torch.equal(model(IMAGES), model.block.forward_twice(IMAGES))


def test_a_module_with_a_gate_behind_it_is_not_deleted():
    model = trained()
    with pytest.raises(AttachError, match=r"'norm' of Block has a gate behind it; ecanet\.detach"):
        del model.block.norm
    assert len(ecanet.attached(model)) == 1


def test_a_conversion_that_would_lose_a_norms_own_gate_is_refused():
    model = trained(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    assert ecanet.attached(model)[0].name == "1.eca"
    with pytest.raises(AttachError, match="convert_sync_batchnorm would lose the gate that BatchNorm2d keeps"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert dict(model[1].named_children()).keys() == {"eca"}


def test_a_module_that_keeps_its_own_gate_may_be_parametrized():
    model = trained(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)))
    expected = model(IMAGES)
    (site,) = ecanet.attached(model)
    parametrizations.weight_norm(model.get_submodule(site.after))
    torch.testing.assert_close(model(IMAGES), expected)
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), expected)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)


def test_a_new_forward_that_would_lose_the_gate_is_refused():
    model = trained()
    block = model.block
    with pytest.raises(AttachError, match="would leave out its attached gates"):
        block.forward = lambda x: x + block.norm(x)


def test_a_patched_class_is_gated(monkeypatch):
    model = trained()
    monkeypatch.setattr(Block, "forward", Block.forward_twice)
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES, 2))


def test_threads_and_exceptions_leave_each_call_one_gate():
    model = trained()
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :3])
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: model(IMAGES), range(32)))
    assert all(torch.equal(y, results[0]) for y in results)
    replica = model.block._replicate_for_data_parallel()
    replica.norm = nn.Identity()  # a replica is another block
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    assert torch.equal(replica(IMAGES), by_hand(replica, IMAGES))


def test_copies_and_pickles_are_blocks_of_their_own():
    model = trained()
    expected = model(IMAGES)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), expected)
        assert len(ecanet.attached(other)) == 1
    other = copy.deepcopy(model)
    other.block.norm = nn.Identity()
    assert torch.equal(model(IMAGES), expected)
    assert torch.equal(other(IMAGES), by_hand(other.block, IMAGES))


def test_parametrizations_added_later_are_seen():
    model = trained()
    parametrizations.weight_norm(model.block.conv2)
    parametrize.register_parametrization(model.block.norm, "weight", nn.Softplus())
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))
    parametrizations.spectral_norm(model.block.eca.conv)
    assert torch.equal(model(IMAGES), by_hand(model.block, IMAGES))


def test_a_traced_block_calls_the_gate_once():
    model = trained()
    graph = fx.symbolic_trace(model)
    assert list(graph.state_dict()) == [key for key in model.state_dict() if key != "block.eca.gain"]  # a constant
    assert torch.equal(graph(IMAGES), model(IMAGES))
    nn.init.zeros_(model.block.eca.conv.weight)  # shared with the graph
    assert torch.equal(graph(IMAGES), model(IMAGES))
    block = fx.symbolic_trace(model.block)
    assert torch.equal(block(IMAGES), model(IMAGES))


def test_torchscript_is_refused_at_once():
    with pytest.raises(AttachError, match=r"^torch\.jit\.script cannot read the gates attached to Block; [^\n]*$"):
        torch.jit.script(trained())
    with pytest.raises(EcanetError, match=r"^torch\.jit\.script cannot read ECA; [^\n]*$"):  # a gate in a Sequential
        torch.jit.script(trained(mobilenet_v2()))
    # The rectifiers keep their own gates, in the graph too, so no graph helps.
    for model in (trained(squeezenet1_1()), fx.symbolic_trace(trained(squeezenet1_1()))):
        with pytest.raises(AttachError, match=r"attached to ReLU; use torch\.export\.export or torch\.jit\.trace$"):
            torch.jit.script(model)
    with pytest.raises(AttachError, match=r"attached to Block; .* or script the graph of torch\.fx\.symbolic_trace$"):
        torch.jit.script(trained())


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support")  # of a GraphModule, any one
@pytest.mark.parametrize("build", [Network, resnet18, mobilenet_v2])
def test_torchscript_takes_the_graph_of_an_attached_network(build):
    model = trained(build())
    image = IMAGES if build is Network else torch.rand(1, 3, 64, 64)
    scripted = torch.jit.script(fx.symbolic_trace(model))
    torch.testing.assert_close(scripted(image), model(image))
    assert {name for name, _ in scripted.named_parameters()} == {name for name, _ in model.named_parameters()}


# containers


def test_gates_are_no_entries_of_containers():
    convolutional = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    for model, image in ((convolutional, IMAGES), (vgg11().features, torch.rand(1, 3, 32, 32))):
        length, plain = len(model), model.eval()(image)
        ecanet.attach(model, example=image)
        assert len(model) == length
        assert torch.equal(model(image), plain)
        sites = ecanet.attached(model)
        assert [site.name for site in sites] == [f"{site.after}.eca" for site in sites]


def test_the_children_of_a_network_keep_their_gates():
    model = trained(vgg11())
    image = torch.rand(1, 3, 32, 32)
    features = nn.Sequential(*list(model.children())[:-1])
    assert torch.equal(features(image), model.avgpool(model.features(image)))
    assert len(ecanet.attached(features)) == 5
    assert len(ecanet.attached(model.features[:6])) == 2


class Tutorial(nn.Module):
    """A network that calls its layers itself."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.head(self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x))))))


@pytest.mark.parametrize("verify", [True, False])
def test_places_are_right_before_they_are_proven(verify):
    image = torch.rand(1, 3, 32, 32)
    for model in (Tutorial(), vgg11()):
        model = ecanet.attach(model.eval(), example=image, verify=verify)
        sites = ecanet.attached(model)
        assert [site.name for site in sites] == [f"{site.after}.eca" for site in sites]
        expected = model.features(image) if hasattr(model, "features") else model(image)
        children = list(model.children())[: 1 if hasattr(model, "features") else None]
        assert torch.equal(nn.Sequential(*children)(image), expected)
