"""Attention modules, and the one table of their names.

Read downward: `recording` (what the gates of a network do on images), `names` (the table that ``attention=`` looks
names up in), `long_range` (non-local, A2, attention-augmented convolution), `positions` (SimAM, coordinate attention,
ELA, EMA), `moments` (GCT, SRM), `frequencies` (FcaNet's gate), `statistics` (eSE, ASR), `others` (CBAM, GC, GSoP),
`gates` (squeeze, gate, scale: ECA, SE and their variants), `base` (what every attention module is). To understand ECA,
begin with `gates`.
"""

from ecanet.attention.base import Attention
from ecanet.attention.frequencies import Fca
from ecanet.attention.gates import (
    ECA,
    ECANS,
    SE,
    SEGC,
    ChannelAttention,
    SEVar1,
    SEVar2,
    SEVar3,
    adaptive_kernel_size,
)
from ecanet.attention.long_range import AugmentedConv2d, DoubleAttention, NonLocal
from ecanet.attention.moments import GCT, SRM, MomentsAttention
from ecanet.attention.names import (
    ATTENTIONS,
    AttentionKind,
    AttentionLike,
    find_attention,
    list_attentions,
    make_attention,
    options_of,
)
from ecanet.attention.others import CBAM, GlobalContext, GSoP, compute_maxima
from ecanet.attention.positions import ELA, EMA, CoordinateAttention, SimAM
from ecanet.attention.recording import (
    Gate,
    GateRecord,
    compute_image_weights,
    find_gates,
    record_gates,
    run_with_held_gates,
)
from ecanet.attention.statistics import ASR, ESE, StatisticsAttention

__all__ = [
    "ASR",
    "ATTENTIONS",
    "CBAM",
    "ECA",
    "ECANS",
    "ELA",
    "EMA",
    "ESE",
    "GCT",
    "SE",
    "SEGC",
    "SRM",
    "Attention",
    "AttentionKind",
    "AttentionLike",
    "AugmentedConv2d",
    "ChannelAttention",
    "CoordinateAttention",
    "DoubleAttention",
    "Fca",
    "GSoP",
    "Gate",
    "GateRecord",
    "GlobalContext",
    "MomentsAttention",
    "NonLocal",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "SimAM",
    "StatisticsAttention",
    "adaptive_kernel_size",
    "compute_image_weights",
    "compute_maxima",
    "find_attention",
    "find_gates",
    "list_attentions",
    "make_attention",
    "options_of",
    "record_gates",
    "run_with_held_gates",
]
