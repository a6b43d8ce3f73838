"""Folders of tiny generated photographs, and the data of such a folder."""

from pathlib import Path
from typing import Any

from PIL import Image

from ecanet import data
from ecanet.recipes import DataConfig


def paint(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # Pillow would choose the format by a suffix that it knows
        Image.new("RGB", (9, 7), (shade % 256, 30, 60)).save(file, "PNG")


def make_flat(folder: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    for name, count in counts.items():
        for at in range(count):
            paint(folder / name / f"{at}.{suffix}", at)
    return folder


def flat(folder: Path, **options: Any) -> Any:
    """Return the data of ``folder:FOLDER``; ``seed``, ``train`` and ``split`` are for `data.build`."""
    ours = {name: options.pop(name) for name in ("seed", "train", "split") if name in options}
    config = DataConfig(name=f"folder:{folder}", **{"image_size": 8, "batch_size": 4, "workers": 0, **options})
    return data.build(config, **ours)


def paths(dataset: Any, folder: Path) -> set[str]:
    return {Path(path).relative_to(folder).as_posix() for path, _ in dataset.samples}
