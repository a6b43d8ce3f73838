"""Tune the constants that stand for gates, and the norms, without labels, until the network says what it said."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.deploy.slim_fit import Constant, Frozen
from ecanet.deploy.slim_judge import Answers, answer, mean_divergence, read_log_probabilities

__all__ = ["copy_affines", "restore_affines", "tune"]

STEPS, BATCH, RATE = 128, 64, 5e-3
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)  # pyright: ignore[reportPrivateUsage]


def tune(
    model: nn.Module, gates: Mapping[Frozen, Constant], batches: Sequence[Tensor], before: Sequence[Answers]
) -> dict[Frozen, Constant]:
    """Return better constants for ``gates``, and put them into ``gates``; with their own, if none are found.

    The least squares see one gate at a time. Here the scales and biases of all ``gates`` move together, and those of
    the network's norms with them; nothing else does. Adam makes the Kullback-Leibler divergence of the class
    probabilities from those in ``before`` small, in 128 steps of 64 images. A gate's bias moves in units of the size of
    its input. If the divergence over all ``batches`` is not smaller afterwards, everything is as it was.
    """
    start = mean_divergence(before, answer(model, batches, None))
    saved = copy_affines(model)
    flags = {affine: affine.requires_grad for affine in saved}
    moves = {gate: torch.zeros_like(torch.stack([gate.scale, gate.bias]), requires_grad=True) for gate in gates}
    moving = [*moves.values(), *(affine.requires_grad_() for affine in saved)]
    optimizer = torch.optim.Adam(moving, lr=RATE)
    parts = draw_parts(batches, before)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        with torch.enable_grad():
            put(gates, moves)
            loss = measure_divergence(model, *next(parts))
            gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        for tensor, gradient in zip(moving, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    for affine, flag in flags.items():
        affine.grad = None
        affine.requires_grad_(flag)
    with torch.no_grad():
        put(gates, moves)
        if mean_divergence(before, answer(model, batches, None)) < start:
            return {gate: move_constant(constant, moves[gate]) for gate, constant in gates.items()}
        put(gates, {gate: torch.zeros_like(move) for gate, move in moves.items()})
    restore_affines(saved)
    return dict(gates)


def draw_parts(batches: Sequence[Tensor], before: Sequence[Answers]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images and their log-probabilities again and again, in random parts, each with one size of image."""
    generator = torch.Generator().manual_seed(0)
    groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for batch, said in zip(batches, before, strict=True):
        rows = zip(batch, cast(Tensor, said.log_probabilities), strict=True)
        groups.setdefault(batch.shape[1:], []).extend(rows)
    while True:
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for rows in groups.values():
            order = shuffle(len(rows), generator)
            parts += [[rows[at] for at in order[i : i + BATCH]] for i in range(0, len(rows), BATCH)]
        for at in shuffle(len(parts), generator):
            images, said = zip(*parts[at], strict=True)
            yield torch.stack(images), torch.stack(said)


def shuffle(count: int, generator: torch.Generator) -> list[int]:
    """Return the numbers below ``count`` in a random order."""
    return cast(list[int], torch.randperm(count, generator=generator).tolist())  # pyright: ignore[reportUnknownMemberType]


def copy_affines(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the scales and biases of the norms in ``model``, each with a copy of its numbers."""
    norms = [one for one in model.modules() if isinstance(one, NORMS)]
    found = [getattr(one, name, None) for one in norms for name in ("weight", "bias")]
    return {one: one.detach().clone() for one in found if isinstance(one, nn.Parameter)}


@torch.no_grad()
def restore_affines(saved: Mapping[nn.Parameter, Tensor]) -> None:
    """Give scales and biases the numbers that `copy_affines` has copied."""
    for affine, numbers in saved.items():
        affine.copy_(numbers)


def measure_divergence(model: nn.Module, images: Tensor, before: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence from the log-probabilities ``before`` (N, K, ...)."""
    (after,) = read_log_probabilities(model, [images])
    p, q = before.to(after), after
    return (p.exp() * (p - q)).sum(1).mean()


def put(gates: Mapping[Frozen, Constant], moves: Mapping[Frozen, Tensor]) -> None:
    """Let each gate compute with its constant, moved; in a gradient context the moves get gradients."""
    for gate, constant in gates.items():
        moved = move_constant(constant, moves[gate])
        gate.scale, gate.bias = moved.scale.to(gate.scale), moved.bias.to(gate.bias)


def move_constant(constant: Constant, move: Tensor) -> Constant:
    """Return ``constant`` with ``move`` (2 C, in the units of the scale and of the input) added to it."""
    scale, bias = move.double()
    bias = bias * constant.size if constant.biased else torch.zeros_like(bias)
    return replace(constant, scale=constant.scale + scale, bias=constant.bias + bias)
