"""Questions that all processes of a run answer together at each step, without waiting for a GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Votes"]


class Votes:
    """A few yes-or-no questions: the answer is yes in every process if one process says yes.

    On a CPU the answers are there at once. On a CUDA GPU `put` returns those of the call before, which the GPU has
    computed meanwhile, so the program never waits for the present step. Every process must make the same calls.
    """

    def __init__(self, device: torch.device, processes: int, questions: int):
        self.device, self.processes, self.questions = device, processes, questions
        self.pending: tuple[Tensor, Any] | None = None

    def put(self, answers: Sequence[bool | Tensor]) -> list[bool]:
        """Give this process's ``answers``, and return those of all processes.

        On a GPU they are the answers to the questions of the last call.
        """
        # A tensor made from a Python value would be copied to a GPU, which waits; one that is filled there does not.
        ballot = torch.stack(
            [
                one.detach().float().reshape(())
                if isinstance(one, Tensor)
                else torch.full((), float(one), device=self.device)
                for one in answers
            ]
        )
        if self.processes > 1:
            torch.distributed.all_reduce(ballot, torch.distributed.ReduceOp.MAX)
        if self.device.type != "cuda":
            return [value > 0 for value in ballot.tolist()]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        before = self.flush()
        copy = torch.empty(ballot.shape, pin_memory=True)
        copy.copy_(ballot, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.pending = copy, done
        return before

    def flush(self) -> list[bool]:
        """Wait for the answers of the last call, if they were not returned yet; else all are no."""
        if self.pending is None:
            return [False] * self.questions
        (copy, done), self.pending = self.pending, None
        done.synchronize()
        return [bool(value) for value in copy]
