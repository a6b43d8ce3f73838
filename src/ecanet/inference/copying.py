"""Copy a network for evaluation."""

import copy
import pickle
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ecanet.errors import ConfigError, summarize

__all__ = ["copy_for_evaluation", "copy_model"]


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in evaluation and without gradients.

    Raises:
        ConfigError: as `copy_for_evaluation`.
    """
    return copy_for_evaluation(model).requires_grad_(False)


def copy_for_evaluation(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in evaluation, whose parameters require gradients as the model's do.

    Raises:
        ConfigError: ``model`` has no weights yet, or is a program that holds no modules of Python.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{name} is TorchScript, whose modules cannot be changed; pass the network it was made from")
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ConfigError(f"{name} has lazy layers without weights; run it once on images first")
    if any(tensor.is_meta for tensor in tensors):
        raise ConfigError(f"{name} has no data (it is on the meta device); load its weights first")
    # PyTorch does not copy a tensor that was computed with gradients, such as the weight that weight norm keeps.
    own = [value for module in model.modules() for value in cast("dict[str, object]", vars(module)).values()]
    made: dict[int, object] = {id(t): t.detach().clone() for t in own if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(model, made).eval()
    except (TypeError, RuntimeError, pickle.PicklingError) as error:  # locks, open files, tensors of a running graph
        raise ConfigError(
            f"{name} cannot be copied ({summarize(error)}); take what holds it out of the model"
        ) from error
