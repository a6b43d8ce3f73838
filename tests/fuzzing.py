"""Break values, texts and files at random, the same way for the same seed, and count what happens to them."""

import copy
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from random import Random
from typing import Any

from ecanet.errors import EcanetError

SEED = 20_261_127
SECONDS = 60
"""A case that computes longer, or waits ten times as long, hangs."""

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3.5, 255, 65_536, 2**31, 2**63, 2**64, 10**300, -(10**300), 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), "", "0", "-1", "a", "digits", "none", "é" * 50, "a" * 5000, "\0", "\ud800", "\udce9",
    "$x_1$", "<b>", "../..", "/", "~", "\x1b[2J", "a\nb", "%s%n", "{}", "folder:.", "FILE.py:make", [], {}, [[]], [{}],
    {"a": {"b": 1}}, [1] * 40, ["a"] * 40, [None], [float("nan")] * 4, [-5, -5, 1e9, 1e9], [0, 0, 0, 0], [[1, 2, 3]],
]  # fmt: skip
"""Values that are wrong almost everywhere."""


class Hang(BaseException):
    """A case took too long; not an Exception, so that no code under test catches it."""


@contextmanager
def limited() -> Generator[None]:
    """Raise Hang in the main thread if this context takes too long."""

    def stop(*_: object) -> None:
        raise Hang

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.alarm(10 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)


class Tally:
    """The number of cases by outcome, and the faults: what was neither done nor refused in one line."""

    def __init__(self, name: str):
        self.name, self.counts, self.faults = name, Counter[str](), list[str]()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"{self.name}: {self.counts.total()} cases ({kinds}), {len(self.faults)} faults"

    def call(self, case: object, function: Callable[[], object]) -> None:
        """Call ``function``; only an error of ecanet with a message of one line may come out."""
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = function()
            self.counts[outcome if isinstance(outcome, str) else "done"] += 1
        except EcanetError as error:
            self.counts["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                self.add(case, f"a message of {len(str(error))} characters: {str(error)[:80]!r}")
        except (Exception, Hang) as error:
            self.counts["failed"] += 1
            place = traceback.extract_tb(error.__traceback__)
            ours = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in place if "/ecanet/" in f.filename]
            self.add(case, f"{type(error).__name__}: {str(error)[:120]} ({' '.join(ours[-3:])})")

    def add(self, case: object, fault: str) -> None:
        self.faults.append(f"{str(case)[:300]}: {fault}")

    def finish(self) -> None:
        """Print the counts, and fail if there are faults."""
        print(f"\n{self}", flush=True)
        assert not self.faults, "\n".join([str(self), *self.faults[:40]])


def break_bytes(random: Random, data: bytes) -> bytes:
    """Return ``data`` with flipped bits, other bytes, a part cut off, doubled, moved or filled with zeros."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        if not data:
            break
        at = min(int(len(data) * random.random() ** random.choice((1, 3))), len(data) - 1)  # often near the beginning
        length = random.choice((1, 2, 4, 8, 64, 1000))
        match random.randrange(7):
            case 0 | 1:
                data[at] ^= 1 << random.randrange(8)
            case 2:
                data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case _:
                data[at : at + 4] = random.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x01", b"\0\0\0\x80")
                )
    return bytes(data)


def break_value(random: Random, value: Any, changes: int = 1) -> Any:
    """Return a copy of nested dictionaries and lists in which values are replaced, left out, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(changes):
        inner, key = value, None
        parents = [(inner, key)]
        while isinstance(inner, dict | list) and inner:
            parents.append(
                (inner, random.choice(list(inner)) if isinstance(inner, dict) else random.randrange(len(inner)))
            )
            inner = inner[parents[-1][1]]
        group, key = random.choice(parents[1:] or parents)
        if not isinstance(group, dict | list) or key is None:
            return copy.deepcopy(random.choice(VALUES))
        match random.randrange(6):
            case 0:
                del group[key]
            case 1 if isinstance(group, list):
                group.insert(key, copy.deepcopy(group[key]))
            case 1:
                group[str(random.choice(VALUES))[:300]] = copy.deepcopy(random.choice(VALUES))
            case 2 if type(group[key]) in (int, float) and abs(group[key]) < 1e290:
                group[key] = group[key] * random.choice((-1, 0, 10, 1e6, 1e12, 0.1))
            case _:
                group[key] = copy.deepcopy(random.choice(VALUES))
    return value
