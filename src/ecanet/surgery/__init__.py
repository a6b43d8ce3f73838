"""Attention in a network that somebody else wrote: `ecanet.attach`, `detach`, `fold`.

Read downward: `attachment` (the functions), `replace` (exchanges existing modules), `build` (the gates of the sites),
`folding`, `report`, `sites` (finds the ends of a network's residual branches), `branches` (which operand of an addition
is one), `example` (runs the network once), `recording` (records that run), `hooks` (how a gate acts), `modules` (typed
views of modules).
"""

from ecanet.surgery.attachment import AttachedSite, Report, attach, attached, detach, fold

__all__ = ["AttachedSite", "Report", "attach", "attached", "detach", "fold"]
