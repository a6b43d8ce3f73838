"""Synchronised batch norm: two processes with parts of a batch equal one process with the whole."""

import copy

import pytest
import torch
from torch import distributed, nn

from ecanet import ECA, ops
from ecanet.models import execution
from quick_interpreter import run_in_interpreter
from two_processes import run_in_two

PARTS = (slice(0, 1), slice(1, 4))
"""The samples of each process."""


def make_modules():
    """Return the norms of branch and shortcut, and a gate, in float64."""
    norm, side, gate = nn.BatchNorm2d(37), nn.BatchNorm2d(37, momentum=None), ECA(37, 3, bias=True)
    for module in (norm, side):
        nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    return nn.ModuleList([norm, side, gate]).double()


def run(modules, tensors, samples, impl, gated, activation="relu"):
    """Return outputs and gradients by name, and the names of those that are sums over samples."""
    norm, side, gate = modules
    z, s, dy = (x[samples].contiguous(memory_format=torch.channels_last) for x in tensors)
    z, s = z.detach().requires_grad_(), s.detach().requires_grad_()
    y = ops.residual_tail(z, norm, gate.weigh if gated else None, s, side, activation, impl=impl)
    if impl == "fused":
        assert y.grad_fn._forward_cls.__module__ == "ecanet.ops.triton.node"
    parameters = {name: p for name, p in modules.named_parameters() if gated or not name.startswith("2")}
    dz, ds, *gradients = torch.autograd.grad(y, (z, s, *parameters.values()), dy)
    return {"y": y.detach(), "dz": dz, "ds": ds}, dict(zip(parameters, gradients, strict=True))


def compare_part(rank, impls):
    if rank:
        run_in_interpreter()
    torch.manual_seed(0)
    tensors = [2 * torch.randn(4, 37, 3, 2).double() + 5 for _ in range(3)]
    modules = make_modules()
    for impl in (pair[rank] for pair in impls):
        for gated in (True, False):
            whole = copy.deepcopy(modules)
            mine = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(modules))
            everything, sums = run(whole, tensors, slice(None), "reference", gated)
            part, terms = run(mine, tensors, PARTS[rank], impl, gated)
            for name, value in part.items():
                torch.testing.assert_close(value, everything[name][PARTS[rank]], rtol=1e-11, atol=1e-11)
            for name, term in terms.items():
                distributed.all_reduce(term)
                torch.testing.assert_close(term, sums[name], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(dict(mine.named_buffers()), dict(whole.named_buffers()))
    check_second_order(rank, modules, tensors, impls[-1][0])


def check_second_order(rank, modules, tensors, impl):
    """Compare gradients of gradients, whose backward computes the statistics again."""
    found = []
    for sync in (True, False):
        norm = copy.deepcopy(modules[0])
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm) if sync else norm
        samples = PARTS[rank] if sync else slice(None)
        z, dy = (x[samples].detach().requires_grad_() for x in tensors[:2])
        y = ops.residual_tail(z, norm, impl=impl if sync else "reference")
        (dz,) = torch.autograd.grad(y, z, dy, create_graph=True)
        (second,) = torch.autograd.grad(dz.square().sum(), z)
        found.append(second if sync else second[PARTS[rank]])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:gradients with create_graph")
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce:FutureWarning")
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    impls = [("lean", "lean")]
    if len(ops.list_implementations()) > 1:  # a process with an empty batch runs lean's algebra
        impls += [("lean", "fused"), ("fused", "fused")]
    run_in_two(compare_part, tmp_path, impls)


def test_the_norm_of_a_shortcut_stays_in_the_tail():
    norm, convolution = nn.SyncBatchNorm(4), nn.Conv2d(3, 4, 1)
    x = torch.randn(2, 3, 2, 2)
    z, found = execution._split_shortcut(nn.Sequential(convolution, norm), x)
    assert found is norm
    torch.testing.assert_close(z, convolution(x))
