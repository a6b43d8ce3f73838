"""An ablation written down: Markdown, JSON, a picture and one self-contained page."""

import json
from typing import Any

from ecanet.recipes import to_dict
from ecanet.report import environment, figures, page, write_file
from ecanet.studies.ablate.grid import Ablation, Estimate, Line

HEADS = ("variant", "also", "parameters", "MACs", "top-1 (%)", "to none, paired", "beyond noise", "seconds")


def write(ablation: Ablation) -> None:
    """Write ablation.md, ablation.json, ablation.png and ablation.html into the ablation's folder."""
    figure = picture(ablation)
    write_file(ablation.folder / "ablation.md", markdown(ablation))
    write_file(ablation.folder / "ablation.json", to_json(ablation))
    write_file(ablation.folder / "ablation.png", figures.to_png(figure))
    write_file(ablation.folder / "ablation.html", html(ablation, figure))


def markdown(ablation: Ablation) -> str:
    """The table, and how to read it."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    lines += ["| " + " | ".join(cells(line)) + " |" for line in ablation.lines]
    return "\n".join([*lines, "", reading(ablation), ""])


def cells(line: Line) -> list[str]:
    """What a row of the table says."""
    noise = {None: "", True: "yes", False: "no"}[line.beyond_noise]
    return [
        line.variant.name,
        ", ".join(line.variant.same_as),
        f"{line.variant.cost.parameters:,}",
        f"{line.variant.cost.macs / 1e6:,.1f} M",
        said(line.top1),
        said(line.difference, sign="+") if line.difference else "",
        noise,
        f"{line.seconds:,.0f}",
    ]


def said(estimate: Estimate, sign: str = "") -> str:
    """A mean with its 95 % interval.

    >>> said(Estimate(mean=0.25, half=0.5), sign="+")
    '+0.25 (-0.25 to +0.75)'
    """
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{sign}.2f}"
    return f"{estimate.mean:{sign}.2f} ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"


def reading(ablation: Ablation) -> str:
    """What the columns are, and what may be concluded from them."""
    seeds, rows = len(ablation.seeds), len(ablation.lines) - 1
    beyond = [line.variant.name for line in ablation.lines if line.beyond_noise]
    found = f"beyond noise: {', '.join(beyond)}" if beyond else "none of the differences is beyond noise"
    if seeds < 2:
        return "One seed: no intervals, and no difference can be told from noise."
    return (
        f"Last epoch's held-out accuracy, mean and 95 % t interval over {seeds} seeds; the paired difference compares "
        f"runs of the same seed. Beyond noise: the interval widened for {rows} comparisons (Bonferroni) leaves out 0. "
        f"Here {found}. Every row had the same data, epochs and settings, tuned for none of them."
    )


def to_json(ablation: Ablation) -> str:
    """Everything, as plain values: the recipe, each row, each seed."""
    rows: list[dict[str, Any]] = []
    for line in ablation.lines:
        difference = line.difference and {"mean": line.difference.mean, "half_width": line.difference.half}
        rows.append(
            {
                "variant": line.variant.name,
                "same_as": list(line.variant.same_as),
                "model": to_dict(line.variant.model),
                "parameters": line.variant.cost.parameters,
                "attention_parameters": line.variant.cost.attention_parameters,
                "macs": line.variant.cost.macs,
                "top1": {"mean": line.top1.mean, "half_width": line.top1.half},
                "difference_to_none": difference,
                "beyond_noise": line.beyond_noise,
                "top1_by_seed": line.by_seed,
                "seconds": line.seconds,
            }
        )
    content = {"environment": environment(), "recipe": to_dict(ablation.recipe), "seeds": ablation.seeds, "rows": rows}
    return json.dumps(content, indent=2)


def picture(ablation: Ablation) -> Any:
    """Differences to none, one dot a seed, with mean and 95 % interval; beside it accuracy against parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.32 * len(ablation.lines)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    plain = ablation.lines[0].by_seed
    for at, line in enumerate(reversed(ablation.lines[1:])):
        colour = "tab:red" if line.beyond_noise else "tab:gray"
        dots = [line.by_seed[seed] - plain[seed] for seed in ablation.seeds]
        left.scatter(dots, [at] * len(dots), s=14, alpha=0.5, color=colour)
        if line.difference is not None:
            left.errorbar(line.difference.mean, at, xerr=line.difference.half, fmt="D", color=colour, capsize=4)
    left.axvline(0, color="black", linewidth=1)
    names = [", ".join((line.variant.name, *line.variant.same_as)) for line in reversed(ablation.lines[1:])]
    left.set_yticks(range(len(names)), names)
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel("top-1 minus none's, same seed (points); red: beyond noise")
    for line in ablation.lines:
        at = (line.variant.cost.parameters, line.top1.mean)
        right.errorbar(*at, yerr=line.top1.half, fmt="o", color="tab:blue")
        right.annotate(line.variant.name, at, (4, 4), textcoords="offset points", fontsize=7)
    right.set(xlabel="parameters", ylabel="top-1 (%)")
    right.margins(x=0.15)
    if max(line.variant.cost.parameters for line in ablation.lines) > 2 * ablation.lines[0].variant.cost.parameters:
        right.set_xscale("log")
    return figure


def html(ablation: Ablation, figure: Any) -> str:
    """The same as one page that needs nothing else."""
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in cells(line)) + "</tr>" for line in ablation.lines)
    seeds = "".join(f"<th>seed {seed}</th>" for seed in ablation.seeds)
    by_seed = "".join(
        f"<tr><td>{line.variant.name}</td>" + "".join(f"<td>{v:.2f}</td>" for v in line.by_seed.values()) + "</tr>"
        for line in ablation.lines
    )
    recipe = ablation.recipe
    return page(
        title=f"Ablation of {recipe.model.name} on {recipe.data.name}",
        subtitle=f"recipe {recipe.name}, {recipe.epochs} epochs, {len(ablation.seeds)} seeds",
        tiles=[(str(len(ablation.lines)), "networks"), (str(len(ablation.lines) * len(ablation.seeds)), "runs")],
        sections=[
            ("Table", reading(ablation), f"<table><tr>{head}</tr>{body}</table>"),
            ("Picture", "", figures.to_svg(figure)),
            ("Each run", "Top-1 in percent.", f"<table><tr><th></th>{seeds}</tr>{by_seed}</table>"),
        ],
        recipe=json.dumps(to_dict(recipe), indent=2),
        environment=environment(),
    )
