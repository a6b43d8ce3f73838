"""The operations of channel attention.

Every operation has one specification and several implementations with the same values and gradients.

Read downward: `dispatch` (chooses the implementation), `convolution` (a convolution with ReLU in its epilogue),
`choices` (chooses the faster of two forms by a trial on the device), `proof` (checks the kernels on a device before
networks use them), `proof_records` (what checks and trials have found on this machine), `triton` (the passes over
memory as kernels for a GPU), `lean` (the passes in PyTorch), `tail` (the algebra between the passes), `nodes` (the
autograd functions around the algebra), `channel_gates` (gates that a kernel can compute), `passes` (the protocol of the
passes), `reference` (the specification, in plain PyTorch), `inputs` (their checks and layouts), `tracing` (lets
torch.fx record a function as one node), `calls` (whether a module must be called or its parts may be used).
"""

from ecanet.ops import lean, proof, reference
from ecanet.ops.calls import (
    call_state,
    has_global_hooks,
    has_original_forward,
    hook_dictionaries,
    is_frozen_norm,
    must_be_called,
    overrides_forward,
)
from ecanet.ops.channel_gates import ChannelGate, describe_gate
from ecanet.ops.choices import list_choices
from ecanet.ops.convolution import Geometry, convolve_relu, has_epilogues, rounds_to_tf32
from ecanet.ops.dispatch import (
    Impl,
    compiles_to_kernels,
    expand,
    find_mode_obstacle,
    get_requested_impl,
    list_implementations,
    predict_gate,
    prefer_impl,
    residual_tail,
    residual_tail_pair,
    runs_on_gpu,
    squeeze_scale,
    uses_kernels,
)
from ecanet.ops.inputs import check_input
from ecanet.ops.reference import Activation, Gate, MomentsGate
from ecanet.ops.tracing import is_exporting, is_jit_tracing, is_traced, record_as_one_node

__all__ = [
    "Activation",
    "ChannelGate",
    "Gate",
    "Geometry",
    "Impl",
    "MomentsGate",
    "call_state",
    "check_input",
    "compiles_to_kernels",
    "convolve_relu",
    "describe_gate",
    "expand",
    "find_mode_obstacle",
    "get_requested_impl",
    "has_epilogues",
    "has_global_hooks",
    "has_original_forward",
    "hook_dictionaries",
    "is_exporting",
    "is_frozen_norm",
    "is_jit_tracing",
    "is_traced",
    "lean",
    "list_choices",
    "list_implementations",
    "must_be_called",
    "overrides_forward",
    "predict_gate",
    "prefer_impl",
    "proof",
    "record_as_one_node",
    "reference",
    "residual_tail",
    "residual_tail_pair",
    "rounds_to_tf32",
    "runs_on_gpu",
    "squeeze_scale",
    "uses_kernels",
]
