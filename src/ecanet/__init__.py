"""Channel attention for convolutional networks: modules, lossless attach, ECA-Nets."""

from ecanet.errors import shorten_interrupts

shorten_interrupts()  # before PyTorch is imported, which takes seconds
del shorten_interrupts

# isort: split
# ruff: noqa: E402

from ecanet.attention import (
    ECA,
    ECANS,
    SE,
    SEGC,
    ChannelAttention,
    SEVar1,
    SEVar2,
    SEVar3,
    adaptive_kernel_size,
    list_attentions,
    make_attention,
)
from ecanet.deploy import export, from_pretrained, push_to_hub, save_pretrained, slim
from ecanet.inference import fuse, optimize
from ecanet.models import create_model, list_models, load_checkpoint
from ecanet.surgery import attach, attached, detach, fold, parameter_groups

__version__ = "1.0.0"

__all__ = [
    "ECA",
    "ECANS",
    "SE",
    "SEGC",
    "ChannelAttention",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "adaptive_kernel_size",
    "attach",
    "attached",
    "create_model",
    "detach",
    "export",
    "fold",
    "from_pretrained",
    "fuse",
    "list_attentions",
    "list_models",
    "load_checkpoint",
    "make_attention",
    "optimize",
    "parameter_groups",
    "push_to_hub",
    "save_pretrained",
    "slim",
]
