"""Walk through a pickle before PyTorch's reader builds what it says: how many steps it takes, how deep tuples lie.

The reader spends about a microsecond on each step, so a few megabytes can take many seconds. And Python computes the
hash of a key by recursion: a tuple nested a million times ends the process, without an exception.
"""

from pathlib import Path

from ecanet.errors import CheckpointError

__all__ = ["LARGEST_PICKLE", "check_pickles"]

LARGEST_PICKLE = 2**25
"""Bytes of a file's names and plain values, without the tensors: enough for 250,000 tensors.

One byte of a pickle can create an object of 200 bytes: a larger limit would need more memory than many machines have.
"""

DEEPEST_TUPLE = 500

MOST_STEPS = 2**19
"""Steps that the smallest file may take. A tensor takes about 35 and, with its place in a zip file, 300 bytes."""

PICKLES = 5
"""Number of them at the beginning of a file in PyTorch's format before 1.6; a zip file has one."""

CLASS, PROTOCOL, END = ord("c"), 0x80, ord(".")

MEMO = {ord("h"): 1, ord("j"): 4, ord("q"): 1, ord("r"): 4}
"""Bytes of the number of a value in the memo: h and j take it from there, q and r put it there."""

LENGTHS = {
    **dict.fromkeys(b"N\x88\x89)]}\x8f", 0),  # None, True, False, and empty containers
    **dict.fromkeys(b"K", 1), **dict.fromkeys(b"M", 2), **dict.fromkeys(b"J", 4), **dict.fromkeys(b"G", 8),
}  # fmt: skip
"""Bytes that follow an operation which puts a plain value on the stack."""

TEXTS = {ord("X"): 4, ord("U"): 1, 0x8A: 1}
"""Bytes of the length that follows an operation with a text or a long number."""

TUPLES = {ord("t"): 0, 0x85: 1, 0x86: 2, 0x87: 3}
"""Number of items of a tuple, by operation; 0 stands for all since the mark."""

POPPED = {ord("Q"): 0, ord("a"): 1, ord("s"): 2, ord("R"): 1, ord("b"): 1, 0x81: 1}
"""Values that an operation takes from the stack, beside the one in whose place its result stands."""


class ExcessError(Exception):
    """There are more steps, or deeper tuples, than there may be."""


def check_pickles(path: Path, data: bytes) -> None:
    """Check the pickles that follow each other in ``data``, a part of the file ``path``.

    Raises:
        CheckpointError: they take more steps than a file of that size needs, or tuples are nested too deep.
    """
    tuples = sum(data.count(code) for code in TUPLES)  # or letters that look so
    if len(data) <= MOST_STEPS and tuples <= DEEPEST_TUPLE:
        return
    at, most = 0, MOST_STEPS + path.stat().st_size // 8
    try:
        for _ in range(PICKLES):
            at = Walk().go(data, at, most)
    except ExcessError as excess:
        raise CheckpointError(
            f"{path} holds {excess}; save only the network's state dict (torch.save(model.state_dict(), PATH)) and "
            "load that"
        ) from None


class Walk:
    """The stack and the memo of PyTorch's reader, in which each value is only the depth of its tuples."""

    def __init__(self):
        self.stack: list[int] = []
        self.marks: list[list[int]] = []
        self.memo: dict[int, int] = {}

    def go(self, data: bytes, at: int, most: int) -> int:
        """Return where the pickle in ``data`` that begins at ``at`` ends, or the end of ``data`` if it is broken.

        The walk also ends at an operation that the reader refuses: the reader will say why.

        Raises:
            ExcessError: it takes more than ``most`` steps, or tuples are nested more than `DEEPEST_TUPLE` times.
        """
        steps = 0
        try:
            while True:
                code, at, steps = data[at], at + 1, steps + 1
                if steps > most:
                    raise ExcessError(f"more than {most:,} plain values")
                if code in LENGTHS:
                    self.stack.append(0)
                    at += LENGTHS[code]
                elif code in TEXTS:
                    self.stack.append(0)
                    at += TEXTS[code] + int.from_bytes(data[at : at + TEXTS[code]], "little")
                elif code in MEMO:
                    self.remember(code, int.from_bytes(data[at : at + MEMO[code]], "little"))
                    at += MEMO[code]
                elif code == CLASS:  # two lines with its name
                    self.stack.append(0)
                    at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
                elif code == PROTOCOL:
                    at += 1
                elif not self.combine(code):
                    return at if code == END else len(data)
        except (IndexError, KeyError, ValueError):
            return len(data)

    def remember(self, code: int, number: int) -> None:
        """Put the last value into the memo, or one of the memo on the stack."""
        if code in b"qr":
            self.memo[number] = self.stack[-1]
        else:
            self.stack.append(self.memo[number])

    def combine(self, code: int) -> bool:
        """Make one value of others; return whether ``code`` is an operation that does so."""
        if code in TUPLES:
            count = TUPLES[code] or len(self.stack)
            items = self.stack[len(self.stack) - count :]
            del self.stack[len(self.stack) - count :]
            self.stack = self.stack if TUPLES[code] else self.marks.pop()
            self.stack.append(1 + max(items, default=0))
            if self.stack[-1] > DEEPEST_TUPLE:
                raise ExcessError(f"tuples nested more than {DEEPEST_TUPLE} times")
        elif code in POPPED:
            del self.stack[len(self.stack) - POPPED[code] :]
            self.stack[-1] = 0
        elif code == ord("("):
            self.marks.append(self.stack)
            self.stack = []
        elif code in b"eu":  # all since the mark go into a list or dictionary
            self.stack = self.marks.pop()
        else:
            return False
        return True
