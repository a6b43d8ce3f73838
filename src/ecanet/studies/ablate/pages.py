"""Write an ablation as Markdown, JSON, a picture and one self-contained HTML page."""

import json

from ecanet.recipes import to_dict
from ecanet.report import environment, figures, make_table, page, write_file
from ecanet.studies.ablate.comparison import Estimate, Result
from ecanet.studies.ablate.figures import draw, draw_panels
from ecanet.studies.ablate.grid import Ablation
from ecanet.studies.ablate.metrics import Metric
from ecanet.studies.ablate.variants import name_network

__all__ = ["explain", "format_estimate", "to_html", "to_json", "to_markdown", "write"]


def write(ablation: Ablation) -> None:
    """Write ablation.md, ablation.json, ablation.png and ablation.html into the ablation's folder."""
    write_file(ablation.folder / "ablation.md", to_markdown(ablation))
    write_file(ablation.folder / "ablation.json", to_json(ablation))
    write_file(ablation.folder / "ablation.png", figures.to_png(draw(ablation)))
    write_file(ablation.folder / "ablation.html", to_html(ablation))


def to_markdown(ablation: Ablation) -> str:
    """Return the table as Markdown, with an explanation below it."""
    columns = _list_columns(ablation)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_format_row(result, ablation.metric)) + " |" for result in ablation.results]
    return "\n".join([*lines, "", explain(ablation), ""])


def _list_columns(ablation: Ablation) -> list[str]:
    also = ablation.results[0].also
    return [
        "variant",
        "same network as",
        "parameters",
        "MACs",
        ablation.metric.heading,
        "paired difference to the plain network",
        "significant (t test, 95 %)",
        *(label for name, label in ablation.metric.also if name in also),
        "seconds",
    ]


def _format_row(result: Result, metric: Metric) -> list[str]:
    digits = metric.digits
    return [
        result.variant.label,
        ", ".join(result.variant.same_as),
        f"{result.variant.cost.parameters:,}",
        f"{result.variant.cost.macs / 1e6:,.1f} M",
        format_estimate(result.score, digits=digits),
        format_estimate(result.difference, sign="+", digits=digits) if result.difference else "",
        {None: "", True: "yes", False: "no"}[result.significant],
        *(format_estimate(estimate, digits=digits) for estimate in result.also.values()),
        f"{result.seconds:,.0f}",
    ]


def format_estimate(estimate: Estimate, sign: str = "", digits: int = 2) -> str:
    """Return a mean with its 95 % interval; ``sign="+"`` shows the sign of positive numbers.

    >>> format_estimate(Estimate(mean=0.25, half=0.5), sign="+")
    '+0.25 (-0.25 to +0.75)'
    """
    style = f"{sign}.{digits}f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{style}}"
    return f"{estimate.mean:{style}} ({estimate.low:{style}} to {estimate.high:{style}})"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one.

    >>> format_count(1, "seed"), format_count(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def explain(ablation: Ablation) -> str:
    """Return what the columns mean, and which differences are significant."""
    seeds, comparisons = len(ablation.seeds), len(ablation.results) - 1
    if seeds < 2:
        return "One seed: there are no intervals, and no difference can be tested."
    names = [result.variant.name for result in ablation.results if result.significant]
    found = f"Significant here: {', '.join(names)}." if names else "No difference is significant here."
    return (
        f"{ablation.metric.meaning}: mean and 95 % t interval over {seeds} seeds. The paired "
        "difference to the plain network subtracts runs of the same seed. It is significant if its t interval, with "
        f"Bonferroni's correction for {format_count(comparisons, 'comparison')}, does not contain 0. {found} "
        "Every variant had the same data, epochs and settings, and the settings were tuned for none of them."
    )


def to_json(ablation: Ablation) -> str:
    """Return everything as JSON: the recipe, each variant, each seed."""
    content = {
        "environment": environment(),
        "recipe": to_dict(ablation.recipe),
        "seeds": ablation.seeds,
        "rows": [_result_to_dict(result, ablation) for result in ablation.results],
    }
    return json.dumps(content, indent=2)


def _result_to_dict(result: Result, ablation: Ablation) -> dict[str, object]:
    detector = {"detector": to_dict(result.variant.recipe.detector)} if ablation.recipe.task == "detection" else {}
    return {
        "variant": result.variant.name,
        "same_as": list(result.variant.same_as),
        "model": to_dict(result.variant.model),
        **detector,
        "parameters": result.variant.cost.parameters,
        "attention_parameters": result.variant.cost.attention_parameters,
        "macs": result.variant.cost.macs,
        ablation.metric.name: _estimate_to_dict(result.score),
        "difference_to_plain": result.difference and _estimate_to_dict(result.difference),
        "significant": result.significant,
        f"{ablation.metric.name}_by_seed": result.by_seed,
        **{name: _estimate_to_dict(estimate) for name, estimate in result.also.items()},
        "seconds": result.seconds,
    }


def _estimate_to_dict(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": estimate.mean, "half_width": estimate.half}


def to_html(ablation: Ablation) -> str:
    """Return one HTML page that needs no other file: the table, the figure, and every run."""
    metric, recipe, networks = ablation.metric, ablation.recipe, len(ablation.results)
    table = make_table(_list_columns(ablation), [_format_row(result, metric) for result in ablation.results])
    by_seed = [
        [result.variant.name, *(f"{score:.{metric.digits}f}" for score in result.by_seed.values())]
        for result in ablation.results
    ]
    amount = f"{format_count(recipe.epochs, 'epoch')}, {format_count(len(ablation.seeds), 'seed')}"
    return page(
        title=f"Ablation of {name_network(recipe)} on {recipe.data.name}",
        subtitle=f"recipe {recipe.name}, {amount}",
        tiles=[(str(networks), "networks"), (str(networks * len(ablation.seeds)), "runs")],
        sections=[
            ("Picture", "", figures.show_plots(draw_panels(ablation))),
            ("Table", explain(ablation), table),
            ("Each run", metric.caption, make_table(["variant", *(f"seed {s}" for s in ablation.seeds)], by_seed)),
        ],
        recipe=recipe,
        environment=environment(),
    )
