"""What every network of this library offers: timm's interface, so that tools written for timm take it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

from ecanet.errors import ConfigError

__all__ = ["FeatureInfo", "FeatureNetwork", "Level", "Network"]


class Level(TypedDict):
    """One resolution of a network's feature maps, under timm's keys."""

    module: str
    """Name of the module that returns the feature map."""
    num_chs: int
    reduction: int
    """Pixels of the image for one position of the feature map, in each direction."""


class FeatureInfo(list[Level]):
    """The levels of a network, finest first.

    >>> from ecanet import create_model
    >>> create_model("resnet18").feature_info.channels()
    [64, 64, 128, 256, 512]
    """

    def channels(self) -> list[int]:
        """Return the number of channels of each level."""
        return [level["num_chs"] for level in self]

    def reduction(self) -> list[int]:
        """Return the reduction of each level."""
        return [level["reduction"] for level in self]

    def module_name(self) -> list[str]:
        """Return the name of the module behind each level."""
        return [level["module"] for level in self]


class Network(nn.Module):
    """A classifier with a trunk and a head: ``forward_head(forward_features(x))``."""

    num_classes: int
    """Number of logits; 0 stands for pooled features without a classifier."""
    num_features: int
    """Number of channels that the head pools."""
    feature_info: FeatureInfo

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor:
            """Call `forward` and the hooks; nn.Module's own signature returns Any."""
            ...

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes), or to pooled features where that is 0."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to the last feature map (N, num_features, h, w)."""
        raise NotImplementedError

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """Map images (N, in_channels, H, W) to the feature maps of every level in ``feature_info``."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a feature map (N, num_features, h, w); with ``pre_logits`` only pool it."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or an identity where there is no classifier."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for ``num_classes``; 0 removes it.

        Raises:
            ConfigError: ``num_classes`` is negative or no integer.
        """
        raise NotImplementedError

    def drop_after(self, level: Level) -> None:
        """Remove the head and every module that runs after ``level``."""
        raise NotImplementedError


class FeatureNetwork(Network):
    """A network without a head, which returns a list of feature maps."""

    out_indices: tuple[int, ...]

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Call `forward` and the hooks."""
            ...

    def forward(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map images (N, in_channels, H, W) to the feature maps of the levels in ``feature_info``, finest first."""
        levels = self.forward_levels(x)
        return [levels[index] for index in self.out_indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Raise ConfigError: there is no head."""
        raise self._no_head()

    def get_classifier(self) -> nn.Module:
        """Raise ConfigError: there is no classifier."""
        raise self._no_head()

    def reset_classifier(self, num_classes: int) -> None:
        """Raise ConfigError once the network is built: a classifier would never run."""
        if hasattr(self, "out_indices"):
            raise self._no_head()
        super().reset_classifier(num_classes)

    def _no_head(self) -> ConfigError:
        return ConfigError(
            f"{type(self).__name__} returns feature maps and has no classifier; build it without features_only=True"
        )

    def keep_levels(self, out_indices: Sequence[int] | None) -> None:
        """Return only these levels from now on (None: all), and remove what only others need.

        Raises:
            ConfigError: an index is not that of a level.
        """
        count = len(self.feature_info)
        chosen = range(count) if out_indices is None else out_indices
        kept = sorted({index + count if index < 0 else index for index in chosen})
        if not kept or kept[0] < 0 or kept[-1] >= count:
            raise ConfigError(
                f"out_indices must be indices of the {count} levels, from 0 to {count - 1}, got {out_indices!r}"
            )
        self.out_indices = tuple(kept)
        self.drop_after(self.feature_info[kept[-1]])
        self.feature_info = FeatureInfo(self.feature_info[index] for index in kept)
        self.num_features = self.feature_info[-1]["num_chs"]
