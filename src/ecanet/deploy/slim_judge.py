"""Compare a network with a changed copy of it, without labels: which decisions differ, and by how much."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet.errors import ConfigError

__all__ = [
    "Answers",
    "Decide",
    "Share",
    "answer",
    "compare",
    "count_needed",
    "mean_divergence",
    "read_log_probabilities",
    "shift",
]

CONFIDENCE = 0.95

Decide = Callable[[object], Tensor]
"""A function from a network's output to its decisions: integers or booleans (N, ...)."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of changed decisions among independent images, and its upper confidence limit."""

    changed: float
    """Images whose decision changed; of an image with several decisions (one a pixel), the share of those."""
    images: int

    @property
    def share(self) -> float:
        """The share of changed decisions."""
        return self.changed / self.images

    @property
    def limit(self) -> float:
        """The one-sided upper 95 % limit of Clopper and Pearson, for the next whole number of changed images.

        An image with several decisions counts as a fraction of one. Shares between 0 and 1 vary less around their mean
        than ones and zeros do, so the limit holds for them too.
        """
        return find_upper_limit(math.ceil(self.changed - 1e-9), self.images)


def find_upper_limit(count: int, n: int) -> float:
    """Return the largest p for which ``count`` or fewer of ``n`` have a probability of 5 % or more.

    >>> round(find_upper_limit(0, 299), 5), round(find_upper_limit(3, 1000), 5)
    (0.00997, 0.00774)
    """
    if count >= n:
        return 1.0
    choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(count + 1)]
    low, high = count / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        chance = sum(math.exp(c + i * math.log(p) + (n - i) * math.log1p(-p)) for i, c in enumerate(choose))
        low, high = (p, high) if chance >= 1 - CONFIDENCE else (low, p)
    return low


def count_needed(budget: float) -> int:
    """Return the number of images from which not a single change proves the ``budget``.

    >>> count_needed(0.01)
    299
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-budget))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a network says to a few images."""

    decisions: Tensor
    """(N, ...)"""
    log_probabilities: Tensor | None
    """(N, K, ...) of K classes; None with a function of the user's."""


@torch.no_grad()
def answer(model: nn.Module, batches: Sequence[Tensor], decide: Decide | None) -> list[Answers]:
    """Return the answers of ``model`` to each of ``batches``.

    Without ``decide`` the output is a tensor of class scores (N, K, ...), or the first one of several: logits, or
    probabilities if they are between 0 and 1 and sum to 1. A single score is a probability if all are between 0 and 1,
    and else a logit; its decision is whether the probability is above one half.

    Raises:
        ConfigError: there are no class scores, or ``decide`` returns something else than decisions.
    """
    outputs = [model(images) for images in batches]
    if decide is not None:
        return [
            Answers(decisions=check_decisions(decide(one), x), log_probabilities=None)
            for one, x in zip(outputs, batches, strict=True)
        ]
    logs = [log.clamp(min=-100).cpu() for log in find_log_probabilities(outputs)]
    return [Answers(decisions=log.argmax(1), log_probabilities=log) for log in logs]


def read_log_probabilities(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the log-probabilities (N, K, ...) that ``model`` gives each of ``batches``; see `answer`."""
    return find_log_probabilities([model(images) for images in batches])


def find_log_probabilities(outputs: Sequence[object]) -> list[Tensor]:
    """Return the log-probabilities (N, K, ...) in each output of a network; see `answer`.

    Raises:
        ConfigError: there are no class scores.
    """
    scores = [find_scores(one) for one in outputs]
    inside = all(bool(((one >= 0) & (one <= 1)).all()) for one in scores)
    single = scores[0].shape[1] == 1
    probable = inside and (single or all(bool(((one.sum(1) - 1).abs() < 1e-3).all()) for one in scores))
    if probable:
        return [(torch.cat([1 - one, one], 1) if single else one).log() for one in scores]
    return [F.logsigmoid(torch.cat([-one, one], 1)) if single else one.log_softmax(1) for one in scores]


def find_scores(output: object) -> Tensor:
    """Return the class scores (N, K, ...) in the output of a network, in float32 or wider.

    Raises:
        ConfigError: there are none.
    """
    content = find_first(output)
    if not isinstance(content, Tensor) or content.dim() < 2 or not content.is_floating_point():
        raise ConfigError(
            f"slim reads class scores (N, K, ...), and the network returns {describe(content)}; pass decide=, a "
            f"function from the network's output to its decisions (N, ...)"
        )
    return content.float() if content.dtype != torch.float64 else content


def find_first(output: object) -> object:
    """Return ``output``, or the first item of a tuple, list or dictionary, however deep."""
    if isinstance(output, dict) and output:
        return find_first(next(iter(cast("dict[object, object]", output).values())))
    if isinstance(output, tuple | list) and output:
        return find_first(cast("Sequence[object]", output)[0])
    return cast(object, output)


def describe(content: object) -> str:
    """Return a few words for messages: the shape of a tensor, or a type."""
    return f"a tensor {tuple(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def check_decisions(decisions: object, images: Tensor) -> Tensor:
    """Return ``decisions``, checked.

    Raises:
        ConfigError: they are no tensor of integers or booleans with one row for each image.
    """
    rows = isinstance(decisions, Tensor) and decisions.dim() and len(decisions) == len(images)
    if not isinstance(decisions, Tensor) or not rows or decisions.is_floating_point():
        raise ConfigError(
            f"decide= must return integers or booleans ({len(images)}, ...), got {describe(decisions)} of "
            f"{getattr(decisions, 'dtype', 'no dtype')}"
        )
    return decisions.cpu()


def compare(before: Sequence[Answers], after: Sequence[Answers]) -> Share:
    """Return the share of decisions in ``after`` that differ from ``before``."""
    changed, images = 0.0, 0
    for a, b in zip(before, after, strict=True):
        differ = (a.decisions != b.decisions).double().reshape(len(a.decisions), -1)
        changed, images = changed + float(differ.mean(1).sum()), images + len(differ)
    return Share(changed=changed, images=images)


def mean_divergence(before: Sequence[Answers], after: Sequence[Answers]) -> float:
    """Return the mean Kullback-Leibler divergence of the class probabilities in ``after`` from those in ``before``.

    With decisions alone it is the share of those that differ. It is infinite where ``after`` is not finite.
    """
    total, count = 0.0, 0
    for a, b in zip(before, after, strict=True):
        if a.log_probabilities is None or b.log_probabilities is None:
            return compare(before, after).share
        p, q = a.log_probabilities.double(), b.log_probabilities.double()
        terms = (p.exp() * (p - q)).sum(1)
        total, count = total + float(terms.sum()), count + terms.numel()
    return total / count if math.isfinite(total) else math.inf


def shift(batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return mildly shifted copies of images (N, C, H, W) by name; none for other shapes.

    They are moved by 1/14 of their height and width (edges repeated), made brighter by 0.2 of the standard deviation of
    all values, pulled to their mean by 30 %, noised with 0.1 of that deviation, and blurred over 3 x 3 pixels.
    """
    if any(images.dim() != 4 or min(images.shape[2:]) < 3 for images in batches):
        return {}
    deviation = float(torch.stack([images.double().std() for images in batches]).mean())
    generator = torch.Generator().manual_seed(0)

    def move(x: Tensor) -> Tensor:
        h, w = (max(1, side // 14) for side in x.shape[2:])
        return F.pad(x, (w, 0, h, 0), mode="replicate")[..., : x.shape[2], : x.shape[3]]

    def flatten(x: Tensor) -> Tensor:
        return x + 0.3 * (x.mean((1, 2, 3), keepdim=True) - x)

    def noise(x: Tensor) -> Tensor:
        return x + 0.1 * deviation * torch.randn(x.shape, generator=generator, device="cpu").to(x)

    def blur(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "translation": move,
        "brightness": lambda x: x + 0.2 * deviation,
        "contrast": flatten,
        "noise": noise,
        "blur": blur,
    }
    return {name: [change(images) for images in batches] for name, change in changes.items()}
