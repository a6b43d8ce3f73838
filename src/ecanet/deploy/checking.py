"""Run a file in its own runtime: outputs beside PyTorch's, operations, and time beside the plain network's."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ecanet.deploy.about import About
from ecanet.deploy.preparation import count_attention, prepare, remove_attention
from ecanet.deploy.programs import CHANGES, Float64, Session, choose_other_size, run_network, widen
from ecanet.deploy.reports import Comparison, ExportReport, Timing
from ecanet.deploy.targets import Target
from ecanet.errors import ExportError, summarize
from ecanet.models import is_detector
from ecanet.testing import bound_relative_error, measure_relative_error

__all__ = ["check_file", "time_in_turns"]

ROUNDS, SECONDS = 5, 2.0
"""The least number of rounds, and the time in which more of them are run, when a file is timed."""
MOST = 200
LOOSE = 0.1
"""The largest relative error that a bound may allow: a larger one would let a file pass without its gates."""
AGAIN = 1e-4
"""The largest relative difference of two runs of one network: sums of several threads differ by less."""
CHANGED = 1e-3
"""Share of the labels or flags of an output that may be others in a file."""
UNCHECKED = "write the file without the check if you must: check=False, or --no-check"
PIXELS, SCORE = 0.05, 1e-3
"""How near a box and a score must be to count as the same detection: far above rounding, far below what matters."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was exported, for the check."""

    model: nn.Module
    """A copy of the user's network on the CPU, which is the reference."""
    inputs: Sequence[Tensor]
    target: Target
    path: Path
    """Where the file is now."""


def check_file(subject: Subject, report: ExportReport) -> ExportReport:
    """Return ``report`` with what the check found.

    Raises:
        ExportError: the runtime cannot open or run the file, or an output is further from PyTorch's than its rounding
            explains.
    """
    target = subject.target
    session = open_session(target, subject.path)
    comparisons, notes = compare_all(subject, session)
    notes += describe_default(subject, session)
    failed = [c for c in comparisons if not c.passed]
    if failed:
        worst = failed[0]
        raise ExportError(
            f"{report.target}: outputs at {'x'.join(map(str, worst.shape))} are off by {worst.error:.1e}, allowed "
            f"{worst.allowed:.1e}; the file was not kept. Another target may do: export(..., target=...)"
        )
    report = replace(
        report,
        comparisons=tuple(comparisons),
        operations=session.operations,
        partitions=session.partitions,
        stray=session.stray,
        notes=(*report.notes, *notes),
    )
    return compare_with_plain(subject, session, report)


def open_session(target: Target, path: Path) -> Session:
    """Return the file in its runtime.

    Raises:
        ExportError: the runtime cannot open it.
    """
    try:
        return target.open(path)
    except Exception as error:  # runtimes raise errors of many classes
        raise ExportError(f"the runtime cannot open {path.name}: {summarize(error)}; the file was not kept") from error


def compare_all(subject: Subject, session: Session) -> tuple[list[Comparison], list[str]]:
    """Compare the file with PyTorch at two batch and two image sizes, as far as both take them."""
    shape, notes = subject.inputs[0].shape, list[str]()
    batches, sides = [len(subject.inputs[0])], [shape[2:]]
    if not is_detector(subject.model):
        if session.takes[0]:
            batches = [1, max(2, shape[0])]
        else:
            notes.append(f"the file takes batches of {shape[0]} alone, so no other was checked")
        if session.takes[1]:
            sides.append(choose_other_size(subject.inputs[0]))
        elif len(shape) > 2:
            notes.append(
                f"the file takes images of {'x'.join(map(str, shape[2:]))} alone, so no other size was checked"
            )
    else:
        notes.append("a detector's file takes images of the example's size, so no other was checked")
    reference, oracle = subject.model, widen(subject.model)
    found: list[Comparison] = []
    generator = torch.Generator().manual_seed(0)
    for batch, side in zip(batches * len(sides), [s for s in sides for _ in batches], strict=True):
        if is_detector(subject.model):
            inputs = list(subject.inputs)
        else:
            inputs = [torch.randn(batch, shape[1], *side, generator=generator, device="cpu")]
            if (batch, side) != (len(subject.inputs[0]), shape[2:]) and not runs(reference, inputs):
                notes.append(f"the network does not take {'x'.join(map(str, inputs[0].shape))}, so it was not checked")
                continue
        found.append(compare(session, reference, oracle, inputs))
    return found, notes


def runs(network: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether PyTorch runs ``network`` on ``inputs``: transformers and others take images of one size."""
    try:
        run_network(network, inputs)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def describe_default(subject: Subject, session: Session) -> list[str]:
    """Return how far the outputs are from PyTorch's in the runtime's default precision, where it may be another."""
    if session.default is None:
        return []
    precision, run = session.default
    reference = run_network(subject.model, subject.inputs)
    error = measure_relative_error(run(subject.inputs), reference)
    return [
        f"checked in f32 by the runtime's precision hint; its default on this processor is {precision}, which is off "
        f"by {error:.1e}"
    ]


def compare(session: Session, reference: nn.Module, oracle: nn.Module, inputs: Sequence[Tensor]) -> Comparison:
    """Return the error of the file's outputs for ``inputs``, and its bound.

    Raises:
        ExportError: the runtime cannot run the file on them or gives another number of outputs, or PyTorch's own
            outputs are no reference.
    """
    plain, exact = run_references(reference, oracle, inputs)
    try:
        outputs = session.run(inputs)
    except Exception as error:  # runtimes raise errors of many classes
        shapes = [tuple(x.shape) for x in inputs]
        raise ExportError(
            f"the runtime cannot run the file on {shapes}: {summarize(error)}; the file was not kept. Another target "
            f"may do: export(..., target=...)"
        ) from error
    if len(outputs) != len(exact):
        raise ExportError(f"the file gives {len(outputs)} outputs, PyTorch {len(exact)}; the file was not kept")
    if is_detector(reference):
        missing = count_missing(exact, outputs), count_missing(exact, plain)
        return Comparison(
            shape=tuple(inputs[0].shape), error=missing[0], allowed=2 * missing[1] + 1 / max(1, len(exact[0]))
        )
    shape, values = tuple(inputs[0].shape), list(zip(outputs, plain, exact, strict=True))
    numbers = [one for one in values if one[2].is_floating_point()]
    error = measure_relative_error([x for x, _, _ in numbers], [z for _, _, z in numbers])
    allowed = bound_relative_error([y for _, y, _ in numbers], [z for _, _, z in numbers], torch.float32)
    if allowed > LOOSE:
        raise ExportError(
            f"PyTorch's outputs in float32 are off by {allowed / 4:.1e} from those in float64, so that the file of "
            f"{type(reference).__name__} cannot be checked; {UNCHECKED}"
        )
    found = Comparison(shape=shape, error=error, allowed=allowed)
    for x, y, z in values:  # labels and masks: few of them may change with the last bit of what they were made from
        if found.passed and not z.is_floating_point():
            changed = Comparison(shape=shape, error=count_changed(x, z), allowed=4 * count_changed(y, z) + CHANGED)
            found = changed if not changed.passed or not numbers else found
    return found


def run_references(
    reference: nn.Module, oracle: nn.Module, inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return PyTorch's outputs for ``inputs`` in float32 and in float64.

    Raises:
        ExportError: they are not finite, another run gives others, or the network does not run in float64.
    """
    name = type(reference).__name__
    plain = run_network(reference, inputs)
    if not all(y.isfinite().all() for y in plain):
        raise ExportError(
            f"{name} returns numbers that are not finite for a random image, so that its file cannot be checked; look "
            f"for NaN in the weights"
        )
    if not plain:
        raise ExportError(f"{name} returns no tensors, so that a file of it has no outputs; return the logits")
    if not is_detector(reference) and measure_relative_error(run_network(reference, inputs), plain) > AGAIN:
        raise ExportError(f"{name} {CHANGES}, so that its file cannot be checked; {UNCHECKED}")
    try:
        with Float64():
            return plain, run_network(oracle, [x.double() for x in inputs])
    except Exception as error:  # a forward may raise anything
        raise ExportError(
            f"{name} does not run in float64, beside which its file is checked: {summarize(error)}; let it take the "
            f"dtype from its input, or {UNCHECKED}"
        ) from error


def count_changed(found: Tensor, exact: Tensor) -> float:
    """Return the share of the elements of ``found`` that are not those of ``exact``; 1 if the shapes differ."""
    return float((found != exact).double().mean()) if found.shape == exact.shape else 1.0


def count_missing(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the share of the detections ``exact`` that are not in ``found``: boxes (N, 4), labels (N), scores (N).

    Their order, and which of two nearly equal ones is kept, depends on the last bit, so they are compared as sets.
    """
    boxes, labels, scores = (x[:, None] for x in exact[:3])
    near = (boxes - found[0].double()).abs().amax(-1) <= PIXELS
    same = near & (labels == found[1]) & ((scores - found[2].double()).abs() <= SCORE)
    return 1 - float(same.any(1).double().mean()) if len(labels) else 0.0


def compare_with_plain(subject: Subject, session: Session, report: ExportReport) -> ExportReport:
    """Return ``report`` with the operations that a gate adds, and its time beside the plain network's."""
    gates = count_attention(subject.model)
    if not gates or is_detector(subject.model):
        return report
    target = subject.target
    path = subject.path.parent / "plain" / subject.path.name  # apart: the user's file may have any name
    path.parent.mkdir()
    network = prepare(remove_attention(subject.model), target.form, early=target.early).network
    target.write(network, subject.inputs, About(), path)
    plain = open_session(target, path)
    steps: dict[str, Callable[[], object]] = {
        "network": lambda: session.run(subject.inputs),
        "plain": lambda: plain.run(subject.inputs),
    }
    times = time_in_turns(steps, seconds=SECONDS)
    ratios = [x / y for x, y in zip(times["network"], times["plain"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    timing = Timing(
        rounds=len(ratios),
        network=1e3 * min(times["network"]),
        plain=1e3 * min(times["plain"]),
        ratio=median,
        low=low,
        high=high,
    )
    extra = sum(session.operations.values()) - sum(plain.operations.values())
    return replace(report, added=extra / gates, timing=timing)


def time_in_turns(steps: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each step in each round: all steps take turns, so that a slow phase slows all alike.

    One round warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    begun = time.perf_counter()
    while len(rounds := next(iter(times.values()))) < MOST:
        if len(rounds) >= ROUNDS and time.perf_counter() - begun > seconds:
            break
        names = list(steps)
        shift = len(rounds) % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - started)
    return times
