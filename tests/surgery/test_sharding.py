"""Sharded training in one process: FSDP2 from the meta device, and checkpoints of torch.distributed.checkpoint."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision import models
from torchvision.models.resnet import BasicBlock

import ecanet
import sweep_checks as sweep
from tensors import noise

WHOLE = StateDictOptions(full_state_dict=True)


@pytest.fixture
def mesh(tmp_path):
    """One process that forms a group of its own."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def make(attention="eca", **options):
    torch.manual_seed(0)
    model = ecanet.attach(models.resnet18(num_classes=4), attention, **options)
    sweep.randomize(model)
    sweep.excite(gates_of(model))
    return model.eval()


def make_sharded(mesh, attention="eca", **options):
    """The same network from the meta device, sharded block by block, in memory that holds nonsense."""
    with torch.device("meta"):
        model = ecanet.attach(models.resnet18(num_classes=4), attention, **options).eval()
    for block in model.modules():
        if isinstance(block, BasicBlock):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    return model


def gates_of(model):
    return [model.get_submodule(site.name) for site in ecanet.attached(model)]


def image():
    return noise(2, 3, 40, 40)


@pytest.mark.parametrize("attention", ["eca", "se", "cbam", "se-gc"])
def test_a_sharded_network_takes_a_whole_file(mesh, attention):
    written, model = make(attention), make_sharded(mesh, attention)
    set_model_state_dict(model, copy.deepcopy(written.state_dict()), options=WHOLE)
    assert torch.equal(model(image()), written(image()))
    whole = get_model_state_dict(model, options=WHOLE)
    assert whole.keys() == written.state_dict().keys()
    assert all(torch.equal(whole[key], tensor) for key, tensor in written.state_dict().items())


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_a_sharded_random_start(mesh):
    """torch's own recipe: memory, then `reset_parameters` of every module that has one."""
    model = make_sharded(mesh, "se")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert [gate.gain for gate in gates_of(model)] == [2.0] * 8
    for gate in gates_of(model):
        gate.neutralize()
    y = model.train()(image())
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None for gate in gates_of(model) for p in gate.parameters())


def test_a_file_in_the_papers_form_sets_the_gain_of_sharded_gates(mesh):
    written, model = make(preserve=False), make_sharded(mesh)
    set_model_state_dict(model, copy.deepcopy(written.state_dict()), options=WHOLE)
    assert [gate.gain for gate in gates_of(model)] == [1.0] * 8
    assert torch.equal(model(image()), written(image()))


@pytest.mark.parametrize("sharded", [True, False])
def test_distributed_checkpoints_hold_the_gain(mesh, tmp_path, sharded):
    written = make("se")
    checkpoint.save({"model": get_model_state_dict(written)}, checkpoint_id=tmp_path / "saved")
    model = make_sharded(mesh, "se") if sharded else ecanet.attach(models.resnet18(num_classes=4), "se").eval()
    for gate in gates_of(model):
        gate.gain = 5.0  # the file knows better
    state = get_model_state_dict(model)
    checkpoint.load({"model": state}, checkpoint_id=tmp_path / "saved")
    set_model_state_dict(model, state)
    assert [gate.gain for gate in gates_of(model)] == [2.0] * 8
    assert torch.equal(model(image()), written(image()))


@pytest.mark.slow
def test_two_processes_take_the_gain_from_the_first(tmp_path):
    """Only the first process has the file; the others get what torch sends them."""
    torch.multiprocessing.spawn(check_process, (str(tmp_path / "store"),), nprocs=2)


def check_process(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    lossless, paper = make(), make(preserve=False)
    wrap = nn.parallel.DistributedDataParallel
    for written, model in ((lossless, make()), (paper, make()), (lossless, wrap(make()))):
        for gate in model.modules():
            if isinstance(gate, ecanet.ECA):
                gate.neutralize()
                gate.gain = 5.0
        state = copy.deepcopy(written.state_dict()) if rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, state, options=options)
        assert torch.equal(model(image()), written(image())), rank
    distributed.destroy_process_group()


def test_data_parallel_training_has_no_unused_parameter(mesh):
    model = nn.parallel.DistributedDataParallel(make("se").train())
    for _ in range(2):
        model(image()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not [name for name, _ in model.named_buffers() if name.endswith("gain")]
