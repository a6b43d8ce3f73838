"""What a file says about its images and classes, so that whoever has the file alone can use it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ecanet.errors import ConfigError, is_text, show_value
from ecanet.networks import Preprocessing

__all__ = ["KEY", "About"]

KEY = "ecanet"
"""The key of the description in a file's metadata: one JSON text, the same for every target."""


@dataclass(frozen=True, kw_only=True)
class About:
    """The classes and the images of a network. Both may be unknown."""

    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, classes: Sequence[str], preprocessing: Preprocessing | None) -> "About":
        """Return the description.

        Raises:
            ConfigError: the classes are not names.
        """
        given: object = classes
        if (
            not isinstance(given, Sequence)
            or isinstance(given, str)
            or not all(isinstance(name, str) for name in given)
        ):
            raise ConfigError(f"classes must be a sequence of names, got {show_value(given)}; pass ('cat', 'dog')")
        if others := [name for name in given if not is_text(name)]:
            raise ConfigError(f"the class name {others[0]!r} is no Unicode text, which a file cannot hold; rename it")
        if not isinstance(preprocessing, Preprocessing | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"preprocessing must be ecanet.networks.Preprocessing, got {show_value(preprocessing)}")
        return cls(classes=tuple(classes), preprocessing=preprocessing)

    def to_json(self) -> str:
        """Return the description as one line of JSON."""
        images = self.preprocessing
        values: dict[str, object] = {"format": 1, "classes": list(self.classes)}
        if images is not None:
            values |= {
                "size": images.size,
                "channels": images.channels,
                "mean": list(images.mean),
                "std": list(images.std),
                "crop": images.crop,
                "interpolation": images.interpolation,
                # mean and std are for pixel values from 0 to 1
                "scale": 1 / 255,
                "layout": "NCHW",
                "colour_order": "RGB" if images.channels == 3 else "grey" if images.channels == 1 else "",
            }
        return json.dumps(values, ensure_ascii=False)
