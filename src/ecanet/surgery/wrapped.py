"""Refuse networks in which a new gate would not run, not train or not be synchronised, and quantized ones."""

from torch import nn

from ecanet.errors import AttachError
from ecanet.surgery.modules import is_compiled, list_modules, own_tensors

WRAPPERS = {
    "DistributedDataParallel": "attach to its .module before wrapping it, so that gates are synchronised",
    "DataParallel": "its replicas would share one gate; use DistributedDataParallel, and attach before wrapping",
    "FullyShardedDataParallel": "attach before sharding",
    "FSDPModule": "attach before sharding",
    "OptimizedModule": "attach before torch.compile, because a compiled model ignores later hooks",
    "ScriptModule": "attach before torch.jit.trace (torch.jit.script cannot read attached gates)",
}
"""Remedies by the name of the wrapper's class, so that the check imports nothing."""

QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
"""Packages of the layers that `torch.ao.quantization.convert` puts in."""

PREPARED = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")
"""Files of the modules that `torch.ao.quantization.prepare` and its like put behind layers."""


def refuse_wrapped(model: nn.Module) -> None:
    """Check that new gates in ``model`` will run, train and be synchronised.

    Raises:
        AttachError: it is wrapped, compiled or lazy.
    """
    for name, module in list_modules(model):
        what = name or "the model"
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                raise AttachError(f"{what} is wrapped in {kind.__name__}: {WRAPPERS[kind.__name__]}")
        if is_compiled(module):
            raise AttachError(f"{what} is compiled: attach before .compile(), which ignores later hooks")
        if any(isinstance(p, nn.UninitializedParameter) for p in own_tensors(module)):
            raise AttachError(f"{what} is lazy and has no channels yet: run the model once before attaching")


def refuse_quantized(model: nn.Module) -> None:
    """Check that ``model`` is not prepared for quantization, and that not all its convolutions are quantized.

    Behind each layer a prepared network has an observer, which ends the branch and which `convert` throws away.

    Raises:
        AttachError: it is, or they are.
    """
    kinds = [type(module) for _, module in list_modules(model)]
    convolutions = [kind for kind in kinds if "Conv" in kind.__name__]
    floating = any(issubclass(kind, nn.Conv1d | nn.Conv2d | nn.Conv3d) for kind in convolutions)
    prepared = any(kind.__module__.startswith(PREPARED) for kind in kinds)
    if prepared or (not floating and any(kind.__module__.startswith(QUANTIZED) for kind in convolutions)):
        raise AttachError(
            f"{type(model).__name__} is {'prepared for quantization' if prepared else 'quantized'}; attach first, then "
            f"quantize with prepare_fx or PT2E"
        )
