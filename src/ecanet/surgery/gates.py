"""Find the attached gates of a network."""

from collections.abc import Iterator

from torch import nn

from ecanet.errors import AttachError
from ecanet.surgery.gating import list_records
from ecanet.surgery.graphs import find_nodes
from ecanet.surgery.modules import list_modules
from ecanet.surgery.records import Record, read_record


def find_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """Yield the name, the module and the record of every attached gate.

    Raises:
        AttachError: a gate is in the model and does nothing, because its place is gone.
    """
    acting = {
        f"{name}.{key}".lstrip("."): record
        for name, block in list_modules(model)
        for key, record in list_records(block).items()
    }
    for name, module in list_modules(model):
        record = acting.pop(name, None) or read_record(module)
        if record is None:
            continue
        keeper, _, key = name.rpartition(".")
        block = model.get_submodule(keeper)
        acts = find_nodes(model, module) if record.mode == "node" else is_reachable(block, key, record)
        if not acts and record.mode in ("call", "node"):
            raise AttachError(
                f"gate {name!r} no longer acts: {f'{keeper}.{record.target}'.strip('.')!r} was removed or replaced "
                f"after attach; detach before such changes and attach again afterwards"
            )
        yield name, module, record
    for name in acting:
        raise AttachError(f"gate {name!r} was deleted or is in the model twice; ecanet.detach takes gates out")


def is_reachable(block: nn.Module, key: str, record: Record) -> bool:
    """Return whether ``block`` applies the gate ``key`` to a module that it still has."""
    if key not in list_records(block):
        return False
    try:
        block.get_submodule(record.target)
    except AttributeError:
        return False
    return True
