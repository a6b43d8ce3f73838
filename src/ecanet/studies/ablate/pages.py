"""Write an ablation as Markdown, JSON, a picture and one self-contained HTML page."""

import json

from matplotlib.figure import Figure

from ecanet.recipes import to_dict
from ecanet.report import environment, figures, page, write_file
from ecanet.studies.ablate.comparison import Estimate, Result
from ecanet.studies.ablate.figures import draw
from ecanet.studies.ablate.grid import Ablation

__all__ = ["explain", "format_estimate", "to_html", "to_json", "to_markdown", "write"]

COLUMNS = (
    "variant",
    "same network as",
    "parameters",
    "MACs",
    "top-1 (%)",
    "paired difference to the plain network",
    "significant (t test, 95 %)",
    "seconds",
)


def write(ablation: Ablation) -> None:
    """Write ablation.md, ablation.json, ablation.png and ablation.html into the ablation's folder."""
    figure = draw(ablation)
    write_file(ablation.folder / "ablation.md", to_markdown(ablation))
    write_file(ablation.folder / "ablation.json", to_json(ablation))
    write_file(ablation.folder / "ablation.png", figures.to_png(figure))
    write_file(ablation.folder / "ablation.html", to_html(ablation, figure))


def to_markdown(ablation: Ablation) -> str:
    """Return the table as Markdown, with an explanation below it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_format_row(result)) + " |" for result in ablation.results]
    return "\n".join([*lines, "", explain(ablation), ""])


def _format_row(result: Result) -> list[str]:
    return [
        result.variant.label,
        ", ".join(result.variant.same_as),
        f"{result.variant.cost.parameters:,}",
        f"{result.variant.cost.macs / 1e6:,.1f} M",
        format_estimate(result.top1),
        format_estimate(result.difference, sign="+") if result.difference else "",
        {None: "", True: "yes", False: "no"}[result.significant],
        f"{result.seconds:,.0f}",
    ]


def format_estimate(estimate: Estimate, sign: str = "") -> str:
    """Return a mean with its 95 % interval; ``sign="+"`` shows the sign of positive numbers.

    >>> format_estimate(Estimate(mean=0.25, half=0.5), sign="+")
    '+0.25 (-0.25 to +0.75)'
    """
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{sign}.2f}"
    return f"{estimate.mean:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"


def explain(ablation: Ablation) -> str:
    """Return what the columns mean, and which differences are significant."""
    seeds, comparisons = len(ablation.seeds), len(ablation.results) - 1
    if seeds < 2:
        return "One seed: there are no intervals, and no difference can be tested."
    names = [result.variant.name for result in ablation.results if result.significant]
    found = f"Significant here: {', '.join(names)}." if names else "No difference is significant here."
    return (
        f"Top-1 is the held-out accuracy after the last epoch: mean and 95 % t interval over {seeds} seeds. The paired "
        "difference to the plain network subtracts runs of the same seed. It is significant if its t interval, with "
        f"Bonferroni's correction for {comparisons} comparisons, does not contain 0. {found} Every variant had the "
        "same data, epochs and settings, and the settings were tuned for none of them."
    )


def to_json(ablation: Ablation) -> str:
    """Return everything as JSON: the recipe, each variant, each seed."""
    content = {
        "environment": environment(),
        "recipe": to_dict(ablation.recipe),
        "seeds": ablation.seeds,
        "rows": [_result_to_dict(result) for result in ablation.results],
    }
    return json.dumps(content, indent=2)


def _result_to_dict(result: Result) -> dict[str, object]:
    difference = result.difference and {"mean": result.difference.mean, "half_width": result.difference.half}
    return {
        "variant": result.variant.name,
        "same_as": list(result.variant.same_as),
        "model": to_dict(result.variant.model),
        "parameters": result.variant.cost.parameters,
        "attention_parameters": result.variant.cost.attention_parameters,
        "macs": result.variant.cost.macs,
        "top1": {"mean": result.top1.mean, "half_width": result.top1.half},
        "difference_to_plain": difference,
        "significant": result.significant,
        "top1_by_seed": result.by_seed,
        "seconds": result.seconds,
    }


def to_html(ablation: Ablation, figure: Figure) -> str:
    """Return one HTML page that needs no other file: the table, the figure, and every run."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in _format_row(result)) + "</tr>" for result in ablation.results
    )
    seeds = "".join(f"<th>seed {seed}</th>" for seed in ablation.seeds)
    by_seed = "".join(
        f"<tr><td>{result.variant.name}</td>"
        + "".join(f"<td>{top1:.2f}</td>" for top1 in result.by_seed.values())
        + "</tr>"
        for result in ablation.results
    )
    recipe, networks = ablation.recipe, len(ablation.results)
    return page(
        title=f"Ablation of {recipe.model.name} on {recipe.data.name}",
        subtitle=f"recipe {recipe.name}, {recipe.epochs} epochs, {len(ablation.seeds)} seeds",
        tiles=[(str(networks), "networks"), (str(networks * len(ablation.seeds)), "runs")],
        sections=[
            ("Table", explain(ablation), f"<table><tr>{head}</tr>{body}</table>"),
            ("Picture", "", figures.to_svg(figure)),
            ("Each run", "Top-1 in percent.", f"<table><tr><th></th>{seeds}</tr>{by_seed}</table>"),
        ],
        recipe=json.dumps(to_dict(recipe), indent=2),
        environment=environment(),
    )
