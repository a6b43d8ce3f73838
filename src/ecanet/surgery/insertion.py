"""Put one gate into a network, and take it out again."""

from collections.abc import Sequence

from torch import fx, nn

from ecanet.attention import AttentionKind
from ecanet.errors import AttachError
from ecanet.surgery.folding import unfold
from ecanet.surgery.gating import install, list_records, uninstall
from ecanet.surgery.graphs import insert_gate, remove_gate, ungroup
from ecanet.surgery.modules import exchange_everywhere
from ecanet.surgery.placing import Site
from ecanet.surgery.records import Record, is_folded, keep_record, read_record


def insert(model: nn.Module, site: Site, kind: AttentionKind, gate: nn.Module, *, lossless: bool) -> str:
    """Put ``gate`` at ``site``, on the device, in the dtype and in the mode of its block; return its name."""
    block, target = model.get_submodule(site.block), find_target(model, site)
    like = next((p for p in (*target.parameters(), *block.parameters()) if p.is_floating_point()), None)
    gate = gate.to(device=site.device, dtype=None if like is None else like.dtype).train(block.training)
    keeper = site.target if site.append else site.block
    prefix = len(keeper) + 1 if keeper else 0
    record = Record(kind.name, site.target[prefix:], "call", lossless=lossless, channels=site.channels, axis=site.axis)
    record.shape = site.shape
    record.affine = None if site.affine is None else site.affine[prefix:]
    keep_record(gate, record)
    if site.node:
        key = find_free_key(block, kind.key)
        record.mode = "node"
        insert_gate(model, site.graph, site.node, f"{keeper}.{key}".lstrip("."), gate, site.axis)
    elif site.append and isinstance(target, nn.Sequential):
        key = str(len(target))
        record.mode, record.target = "append", str(len(target) - 1)
        target.append(gate)
    else:
        key = find_free_key(block, kind.key)
        install(block, key, gate, record)
    return f"{keeper}.{key}".lstrip(".")


def find_target(model: nn.Module, site: Site) -> nn.Module:
    """Return the module behind which the gate of ``site`` stands; the graph, for a node that calls a function."""
    return model.get_submodule(site.graph if site.node and not site.module else site.target)


def find_free_key(block: nn.Module, key: str) -> str:
    """Return ``key``, followed by a number if ``block`` uses that name itself (timm's blocks have ``se``)."""
    count = 2
    free = key
    while hasattr(block, free):
        free, count = f"{key}{count}", count + 1
    return free


def remove(model: nn.Module, name: str, gate: nn.Module, record: Record) -> None:
    """Undo the changes that `attach` and `fold` made for one gate."""
    keeper, _, key = name.rpartition(".")
    block = model.get_submodule(keeper)
    if is_folded(gate, record):
        unfold(block, gate, record)
    if record.mode == "call":
        uninstall(block, key)
    elif record.mode == "node":
        remove_gate(model, name, gate, record.axis)
    elif record.mode == "append":
        assert isinstance(block, nn.Sequential)
        del block[int(key)]
    elif record.replaced is not None:
        like = next(gate.parameters(), None)
        replaced = record.replaced if like is None else record.replaced.to(like.device, like.dtype)
        exchange_everywhere(model, gate, replaced.train(gate.training))
        if record.moved is not None:
            assert isinstance(replaced, fx.GraphModule)
            ungroup(model, replaced, record.moved)


def refuse_twice(model: nn.Module, sites: Sequence[Site], kind: AttentionKind) -> None:
    """Check that no site already ends in this kind of attention.

    Raises:
        AttachError: one does.
    """
    for site in sites:
        block, target = model.get_submodule(site.block), find_target(model, site)
        last = target[-1] if site.append and isinstance(target, nn.Sequential) else target
        record = read_record(last)
        relative = site.target[len(site.block) + 1 if site.block else 0 :]
        gates = [one.attention for one in list_records(block).values() if one.target == relative]
        gates += [record.attention] if record is not None else []
        nodes = [one for child in block.children() if (one := read_record(child)) is not None and one.mode == "node"]
        gates += [one.attention for one in nodes if one.target == relative]
        place = site.block or site.target
        if kind.name in gates:
            raise AttachError(f"{place!r} already has attention {kind.name!r}; detach first")
        if type(last) is kind.factory:
            raise AttachError(
                f"{place!r} was built with attention {kind.name!r}, which detach() leaves alone; select other modules "
                f"with where=, or build the network with attention='none'"
            )
