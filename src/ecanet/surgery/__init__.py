"""Attention in a network that somebody else wrote: `ecanet.attach`, `detach`, `fold`.

Read downward: `attachment` (the functions), `replace` (exchanges existing modules), `build` (the gates of the sites),
`folding`, `report`, `example` (runs the network once), `sites` (finds the ends of its residual branches), `branches`
(which operand of an addition is one), `watch` (records a run), `hooks` (how a gate acts).
"""

from ecanet.surgery.attachment import AttachedSite, Report, attach, attached, detach, fold

__all__ = ["AttachedSite", "Report", "attach", "attached", "detach", "fold"]
