"""The README of a folder with a trained network: a model card of what is known, and nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecanet.networks import WEIGHTS, Pretrained, is_ours

__all__ = ["PICTURE", "WRITTEN_BY", "Measured", "Metric", "write_card"]

PICTURE = "gates.png"
WRITTEN_BY = "written by ecanet"
"""What the card says of its writer, before the version."""

MOST_NAMES = 20
"""Class names that the card lists; config.json has all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One held-out metric: its ``value`` for these weights, and over several seeds its mean and 95 % t interval."""

    name: str
    label: str
    value: float
    mean: float | None = None
    half: float | None = None
    """Half the width of the interval."""
    seeds: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run knows about its network beside the weights.

    Attributes:
        data: the name of the data set.
        metrics: on its held-out images.
        cost: pairs of a quantity and its value, as text.
        notes: sentences about how the figures were measured.
        picture: a picture of the gates, as a PNG file.
    """

    data: str
    metrics: Sequence[Metric]
    cost: Sequence[tuple[str, str]]
    notes: Sequence[str]
    picture: Path | None = None


def write_card(config: Pretrained, parameters: int, measured: Measured | None) -> str:
    """Return the text of README.md; figures are those of ``measured`` alone, and the number of ``parameters``."""
    network = config.network
    title = network.name if network.attention == "none" else f"{network.name} with {network.attention}"
    parts = [
        f"---\n{_write_metadata(config, title, measured)}\n---",
        f"# {title}",
        f"An image classifier of {len(config.class_names):,} classes, {WRITTEN_BY} {config.version}.",
        _write_usage(config),
        f"## Network\n\n{_write_network(config, parameters)}",
    ]
    if measured is not None:
        parts += _write_measured(measured)
    if config.recipe is not None:
        parts.append(f"## Recipe\n\n```json\n{json.dumps(config.recipe, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def _write_metadata(config: Pretrained, title: str, measured: Measured | None) -> str:
    """Return the card's metadata as YAML, in the Hugging Face Hub's fields."""
    from huggingface_hub import EvalResult, ModelCardData

    results: list[EvalResult] | None = None
    if measured is not None and any(metric.name == "top1" for metric in measured.metrics):
        top1 = next(metric for metric in measured.metrics if metric.name == "top1")
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=measured.data,
                dataset_name=measured.data,
                metric_type="accuracy",
                metric_name=top1.label,
                metric_value=round(top1.value, 2),
            )
        ]
    tags = ["ecanet", "channel-attention", "pytorch"]
    data = ModelCardData(
        library_name="ecanet",
        pipeline_tag="image-classification",
        tags=tags,
        model_name=title if results else None,
        eval_results=results,
    )
    return data.to_yaml().strip()  # pyright: ignore[reportUnknownMemberType]


def _write_usage(config: Pretrained) -> str:
    gates = "" if config.network.attention == "none" else ", with its gates in place"
    return f"""## Use

```python
import ecanet                                      # pip install 'ecanet[hub]'

model = ecanet.from_pretrained("REPOSITORY or FOLDER")   # in evaluation mode{gates}
model.pretrained_config.class_names, model.pretrained_config.preprocessing
```

On the command line: `ecanet predict FOLDER image.jpg`. `{WEIGHTS}` holds the tensors under the network's own names;
without those of the gates (`sites` in `config.json`) they are the plain network's."""


def _write_network(config: Pretrained, parameters: int) -> str:
    network, made_for = config.network, config.preprocessing
    sizes = sorted({site["kernel_size"] for site in config.sites.values() if site["kernel_size"] is not None})
    kernels = f", kernel sizes {', '.join(map(str, sizes))}" if sizes else ""
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (made_for.mean, made_for.std))
    names = ", ".join(config.class_names[:MOST_NAMES]) + (", …" if len(config.class_names) > MOST_NAMES else "")
    # A grey image is repeated for another library's network, which takes three channels.
    repeated = ", repeated for 3 channels" if made_for.channels == 1 and not is_ours(network.name) else ""
    rows = [
        ("network", f"`{network.name}`"),
        ("attention", f"{network.attention}: {len(config.sites)} gates{kernels}"),
        ("parameters", f"{parameters:,}"),
        ("image", f"{made_for.size} × {made_for.size}, {config.colour_order}{repeated}"),
        ("resizing", f"{made_for.interpolation}, to a central crop of {made_for.crop:.1%} of the short side"),
        ("normalization", f"mean {mean}; standard deviation {std} (of values from 0 to 1)"),
        ("classes", names),
    ]
    return _write_table(("", ""), rows)


def _write_measured(measured: Measured) -> list[str]:
    rows: list[Sequence[str]] = []
    for metric in measured.metrics:
        interval = "" if metric.mean is None else f"{metric.mean:.2f}"
        interval += "" if metric.half is None else f" ± {metric.half:.2f} ({metric.seeds} seeds)"
        rows.append((metric.label, f"{metric.value:.4g}", interval))
    has_intervals = any(metric.half is not None for metric in measured.metrics)
    head = ("held-out metric", "these weights", "mean and 95 % t interval")
    width = 3 if has_intervals else 2
    parts = [
        f"## Data and metrics\n\nTrained on `{measured.data}`; the metrics are of its held-out images.\n\n"
        + _write_table(head[:width], [row[:width] for row in rows]),
        *measured.notes,
        "## Cost\n\n" + _write_table(("", ""), measured.cost),
    ]
    if measured.picture is not None:
        parts.append(f"## Gates\n\n![The weights of the gates]({PICTURE})")
    return parts


def _write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; a bar or a line break in a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in line)} |" for line in lines)
