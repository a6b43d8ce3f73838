"""Time how fast one core reads training images: this library's folders and shards beside torchvision and timm.

    OMP_NUM_THREADS=1 python benchmarks/input.py --out benchmarks/results/input.json       # about ten minutes

Photographs of 500 x 375 pixels are drawn (as large, on average, as ImageNet's). Each reader makes batches of them:
decoded, cropped at random to 224 pixels, flipped. The readers take turns, so that whatever else the machine does
meets all of them. Ours hand over bytes, which the device normalizes; timm's transform and torchvision's usual one
normalize on the CPU, and a row without that is there for comparison.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ecanet import data
from ecanet.recipes import DataConfig
from ecanet.report import write_file
from ecanet.shards import pack

BATCH, SIZE = 32, 224
BASE = "torchvision ImageFolder"
"""The row that the others are compared with."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Reader = Callable[[], Iterable[object]]


def draw_photographs(folder: Path, count: int) -> int:
    """Write ``count`` photographs in two classes, training and held-out ones, and return their mean length in bytes."""
    random = np.random.default_rng(0)
    sizes = []
    for at in range(count):
        part = folder / ("val" if at % 16 < 2 else "train") / ("a", "b")[at % 2]
        part.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        noise = random.normal(0, 9, (375, 500, 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(part / f"{at}.jpg", quality=90)
        sizes.append((part / f"{at}.jpg").stat().st_size)
    return round(statistics.mean(sizes))


def make_readers(folder: Path) -> dict[str, Reader]:
    """Return the readers by name."""
    crop = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    usual = v2.Compose([*crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    plain = v2.Compose([*crop, v2.PILToTensor()])

    def read(name: str) -> Reader:
        config = DataConfig(name=name, image_size=SIZE, batch_size=BATCH, workers=0)
        return data.build(config).train_dataloader

    def others(transform: Callable[[Image.Image], object]) -> Reader:
        images = ImageFolder(folder / "photos" / "train", transform)
        return lambda: DataLoader(images, BATCH, shuffle=True, drop_last=True)

    readers = {
        BASE: others(usual),
        "torchvision ImageFolder, bytes": others(plain),
        "ecanet folder": read(f"folder:{folder / 'photos'}"),
        "ecanet shards": read(f"shards:{folder / 'packed'}"),
        "ecanet shards, packed at 256 pixels": read(f"shards:{folder / 'small'}"),
    }
    try:
        from timm.data import create_transform

        readers["timm's transform"] = others(create_transform(SIZE, is_training=True, color_jitter=None))
    except ImportError:
        print("timm is not installed: its row is left out", file=sys.stderr)
    return readers


def measure(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Return images per second of each reader in each round; the order of the readers turns."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            images, start = 0, time.perf_counter()
            for batch in readers[name]():
                images += len(batch[0])
            if number:  # the first round fills the caches
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def summarize(rates: dict[str, list[float]]) -> list[dict[str, object]]:
    """Return a row for each reader: its median rate, and the median and the quartiles of its ratio to `BASE`."""
    rows = []
    for name, values in rates.items():
        ratios = [one / base for one, base in zip(values, rates[BASE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "reader": name,
                "images per second": round(statistics.median(values), 1),
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = draw_photographs(folder / "photos", arguments.images)
        for out, side in (("packed", None), ("small", 256)):
            pack(folder / "photos", folder / out, size=side, workers=1)
        rows = summarize(measure(make_readers(folder), arguments.rounds))
    for row in rows:
        print(f"{row['reader']:40}{row['images per second']:8} a second{row['ratio']:8} {row['quartiles']}")
    if arguments.out:
        record = {
            "command": f"python benchmarks/input.py --images {arguments.images} --rounds {arguments.rounds}",
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "bytes of a photograph": size,
            "rows": rows,
        }
        write_file(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
