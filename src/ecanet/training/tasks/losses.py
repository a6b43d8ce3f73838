"""The losses of classification, with label smoothing, mixed labels and class weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["balance_classes", "compute_loss"]


def compute_loss(
    logits: Tensor, labels: Tensor, *, name: str, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Return the mean loss of ``logits`` (N, K); ``labels`` are class indices (N,) or probabilities (N, K).

    ``name`` is "cross-entropy", or "bce" for the sum of K binary cross-entropies. With ``weights`` (K,) the loss of an
    image with label y counts w_y times. An image with mixed labels q has the loss sum_y q_y w_y loss(y). The sum is
    divided by N and not by the weights, so that a batch of frequent classes counts less than one of rare classes, as it
    would if the images themselves were repeated.
    """
    if weights is None:
        if name == "cross-entropy":
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        targets = _smooth(_to_probabilities(labels, logits), smoothing)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
    # Both losses are linear in the target, so sum_y q_y w_y loss(y) is sum(q w) times the loss of q w / sum(q w).
    weighted = _to_probabilities(labels, logits) * weights
    times = weighted.sum(1)
    shares = weighted / times.clamp_min(torch.finfo(times.dtype).tiny)[:, None]
    targets = _smooth(shares, smoothing)
    if name == "cross-entropy":
        losses = F.cross_entropy(logits, targets, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return (times * losses).mean()


def balance_classes(labels: Sequence[int], classes: int) -> Tensor:
    """Return the weights (K,) with which all ``classes`` count the same: N / (K N_k), whose mean over the images is 1.

    >>> balance_classes([0, 0, 0, 1], 2).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = torch.tensor(labels).bincount(minlength=classes)
    return len(labels) / (classes * counts.clamp_min(1).float())


def _to_probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """Return ``labels`` as probabilities (N, K) in the dtype of ``logits``."""
    return (F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels).to(logits.dtype)


def _smooth(targets: Tensor, smoothing: float) -> Tensor:
    return targets * (1 - smoothing) + smoothing / targets.shape[1]
