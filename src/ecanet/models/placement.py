"""The places of attention in a ResNet: the end of each residual branch, or those in the attention's own paper.

eca, se, …, cbam, gc    the end of every branch; also ASR, eSE, GCT, SRM, FcaNet, SimAM, coordinate attention, ELA, EMA
gsop                    the end of the last branch of each stage; the last stage keeps its resolution
a2                      after every second block of the second and third stage (5 in a ResNet-50)
non-local               before the last block of the third stage (res4)
aa                      in place of one 3x3 convolution per block, from the second stage on
"""

from torch import nn

from ecanet.attention import AugmentedConv2d
from ecanet.errors import check_positive_int
from ecanet.models.slots import Slot

IN_RESNETS_ONLY = ("gsop", "a2", "non-local", "aa")
"""Attentions whose papers define their places by the stages of a ResNet."""


def choose_slot(slot: Slot, index: int, depth: int) -> Slot:
    """Return the slot in the branch of block ``index`` of a stage of ``depth`` blocks: ``slot``, or an empty one."""
    if slot.name in ("a2", "non-local", "aa") or (slot.name == "gsop" and index < depth - 1):
        return Slot()
    return slot


def follows_block(slot: Slot, stage: int, index: int, depth: int) -> bool:
    """Return whether the attention follows block ``index`` of a stage of ``depth`` blocks, outside its branch."""
    match slot.name:
        case "a2":
            return stage in (1, 2) and index % 2 == 1
        case "non-local":
            return stage == 2 and index == max(0, depth - 2)
        case _:
            return False


def choose_stride(slot: Slot, stage: int, stages: int) -> int:
    """Return the stride of the first block of ``stage``, one of ``stages``."""
    keeps_resolution = stage == 0 or (slot.name == "gsop" and stage == stages - 1)
    return 1 if keeps_resolution else 2


def augment(slot: Slot, stage: int, block: nn.Module, conv: str) -> None:
    """Replace ``block``'s 3x3 convolution ``conv`` by an attention-augmented one, if the slot's attention is "aa"."""
    if slot.name != "aa" or stage == 0:
        return
    old = block.get_submodule(conv)
    assert isinstance(old, nn.Conv2d)
    heads = check_positive_int("heads", slot.options.get("heads", 8))
    augmented = AugmentedConv2d(old.in_channels, old.out_channels, stride=old.stride[0], heads=heads)
    block.add_module(conv, augmented)
