"""The images that `ecanet.slim` gets: checked, and split into those to fit with and those to judge by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.deploy.programs import CHANGES, flatten, repeats
from ecanet.deploy.slim_judge import count_needed
from ecanet.errors import ConfigError, show_value, summarize

__all__ = ["Images", "Sets", "check_runs", "split_images"]

Images = Tensor | Iterable[Tensor]
"""Images (N, ...) as the network takes them, or batches of such."""

BATCH = 128
MOST_FITTED = 4096
"""More images hardly change what is tuned, and judge instead."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The images of `ecanet.slim`, each set in batches."""

    fitted: list[Tensor]
    """What constants are fitted to and tuned on."""
    judged: list[Tensor]
    """What else is held to the budget; none of it has a part in the constants."""
    others: dict[str, list[Tensor]]
    """The caller's further sets, which judge as well."""
    halved: bool
    """Whether the fitted and the judged images came as one set."""

    def to(self, device: torch.device) -> "Sets":
        """Return the sets on ``device``."""
        fitted, judged, *others = (
            [images.to(device) for images in batches] for batches in (self.fitted, self.judged, *self.others.values())
        )
        named = dict(zip(self.others, others, strict=True))
        return Sets(fitted=fitted, judged=judged, others=named, halved=self.halved)

    def check_count(self, budget: float) -> None:
        """Check that there are enough images to prove the budget.

        Raises:
            ConfigError: there are too few.
        """
        need = count_needed(budget)
        for name, count, factor in [
            ("images", sum(map(len, self.judged)), 2 if self.halved else 1),
            *((f"also {name!r}", sum(map(len, batches)), 1) for name, batches in self.others.items()),
        ]:
            if count < need:
                half = ", every second one of which judges" if factor == 2 else ""
                raise ConfigError(
                    f"{name}: a budget of {budget:g} needs {factor * need} images or more{half}, got "
                    f"{'about ' * (factor == 2)}{factor * count}; give more images, or a larger budget"
                )


def split_images(model: object, images: object, budget: object, also: object, fit_images: object) -> Sets:
    """Return the images to fit with, those to judge by, and the other sets.

    With ``fit_images`` all of ``images`` judge; without, every second one fits, until there are enough.

    Raises:
        ConfigError: an argument has another type or value.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"slim takes a network (a torch.nn.Module), got {show_value(model)}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < 1:
        raise ConfigError(
            f"budget must be a share of decisions between 0 and 1, such as 0.01, got {show_value(budget)}"
        )
    if not isinstance(also, Mapping | None):
        raise ConfigError(f"also= takes images by name, such as {{'noise': images}}, got a {type(also).__name__}")
    if fit_images is not None and fit_images is images:
        raise ConfigError("fit_images= must be other images than those that judge; without it, half of them judge")
    given = make_batches(images, "images")
    if fit_images is None:
        fitted, judged = halve(given)
    else:
        fitted, judged = make_batches(fit_images, "fit_images"), given
    named = cast("Mapping[str, object]", also or {})
    others = {str(name): join(make_batches(value, str(name))) for name, value in named.items()}
    return Sets(fitted=join(fitted), judged=join(judged), others=others, halved=fit_images is None)


def halve(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return every second image, as long as fewer than needed are fitted, and all others."""
    fitted, judged = list[Tensor](), list[Tensor]()
    seen = taken = 0
    for batch in batches:
        fits = torch.arange(seen, seen + len(batch), device=batch.device) % 2 == 0
        fits &= fits.cumsum(0) <= MOST_FITTED - taken
        fitted.append(batch[fits])
        judged.append(batch[~fits])
        seen, taken = seen + len(batch), taken + int(fits.sum())
    return fitted, judged


def join(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the images of ``batches`` in fewer and larger batches; images of another size begin a new one."""
    groups: list[list[Tensor]] = []
    for batch in batches:
        if groups and batch.shape[1:] == groups[-1][0].shape[1:] and sum(map(len, groups[-1])) + len(batch) <= BATCH:
            groups[-1].append(batch)
        elif len(batch):
            groups.append([batch])
    return [torch.cat(group) for group in groups]


def make_batches(images: object, name: str) -> list[Tensor]:
    """Return ``images`` in batches that are neither empty nor large.

    Raises:
        ConfigError: they are no tensors of images, or none.
    """
    found: list[Tensor] = []
    rest = [images] if isinstance(images, Tensor) else images
    for batch in cast("Iterable[object]", rest) if isinstance(rest, Iterable) else [rest]:
        if not isinstance(batch, Tensor) or batch.dim() < 2 or not batch.is_floating_point() or batch.is_meta:
            what = describe(batch) if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise ConfigError(f"{name} must be float tensors (N, C, ...), without labels, got {what}")
        if not batch.isfinite().all():
            raise ConfigError(f"{name} have NaN or infinity in them; look at how they are normalized")
        found += [batch[i : i + BATCH].detach() for i in range(0, len(batch), BATCH)]
    if not found:
        raise ConfigError(f"{name}: there are no images; slim needs some to look at the gates")
    first = found[0][:1]
    same = all(batch.shape[1:] == first.shape[1:] and bool((batch == first).all()) for batch in found)
    if same and sum(map(len, found)) > 1:
        raise ConfigError(f"{name}: all images are the same, so that every gate would seem constant; give others")
    return found


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of ``tensor`` in words."""
    shape = "x".join(map(str, tensor.shape)) or "()"
    return f"a tensor of shape {shape} in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@torch.no_grad()
def check_runs(model: nn.Module, images: Tensor) -> None:
    """Run ``model`` twice.

    Raises:
        ConfigError: it does not take the images, or does not return the same for them again.
    """
    try:
        first, again = flatten(model(images)), flatten(model(images))
    except Exception as error:  # a forward may raise anything
        what = f"{'x'.join(map(str, images.shape))} in {str(images.dtype).removeprefix('torch.')}"
        raise ConfigError(
            f"{type(model).__name__} does not run on images of {what}: {summarize(error)}; give them as in training"
        ) from error
    if not repeats(first, again):
        raise ConfigError(f"{type(model).__name__} {CHANGES}, so that nothing shows what a gate changes")
