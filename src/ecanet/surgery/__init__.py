"""Attention in a network that somebody else wrote: `ecanet.attach`, `detach`, `fold`, `parameter_groups`.

Read downward: `attachment` (the functions), `scalings` (the gates of any network, and the layers that can take the
constant of one), `replace` (exchanges existing attention), `choice` (which modules are meant), `recognition` (finds
them), `conversion` (reads the kernel of an ECA module), `proof` (puts gates in, and proves them or undoes everything),
`outputs` (compares outputs), `patterns` (makes modules of the attention in graphs),
`insertion` (puts a gate in and takes it out), `build` (the gates of the sites), `parameters` (groups them for an
optimizer), `folding`, `report`, `probing` (runs a module on chosen numbers), `forms` (reads factors off outputs),
`gates` (finds the attached gates), `wrapped` (networks that take none), `sites` (finds the ends of a network's residual
branches), `placing` (who keeps a gate), `selection` (``where=``), `branches` (which operand of an addition is one),
`example` (runs the network once), `state` (lets nothing of that run remain), `recording` (records that run), `gating`
(how a gate acts), `layout` (applies it to one tensor), `records` (what is remembered of one gate), `graphs` (edits the
graphs of `torch.fx`), `modules` (typed views of modules).
"""

from ecanet.surgery.attachment import AttachedSite, Report, attach, attached, detach, fold
from ecanet.surgery.example import record_run, run_again
from ecanet.surgery.gating import list_records, take_apart, uninstall
from ecanet.surgery.modules import children_of, list_modules, own_tensors
from ecanet.surgery.parameters import parameter_groups
from ecanet.surgery.recording import Call, Trace, Value, iterate_tensors
from ecanet.surgery.records import read_record
from ecanet.surgery.scalings import Scaling, find_scalings

__all__ = [
    "AttachedSite",
    "Call",
    "Report",
    "Scaling",
    "Trace",
    "Value",
    "attach",
    "attached",
    "children_of",
    "detach",
    "find_scalings",
    "fold",
    "iterate_tensors",
    "list_modules",
    "list_records",
    "own_tensors",
    "parameter_groups",
    "read_record",
    "record_run",
    "run_again",
    "take_apart",
    "uninstall",
]
