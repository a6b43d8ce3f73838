"""Draw the pictures of the benchmark and make its tables from its JSON file."""

from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from finetuning import ARMS
from pictures import ARMS as PICTURE_ARMS

NAMES = {
    "plain": "plain network",
    "eca": "ECA, lossless",
    "se": "SE, lossless",
    "cbam": "CBAM, lossless",
    "eca-random": "ECA, random gates",
    "se-random": "SE, random gates",
    "eca-random-recalibrated": "ECA, random, recalibrated",
    "eca-gates-x10": "ECA, lossless, gates × 10",
    "eca-gates-x50": "ECA, lossless, gates × 50",
}
STATES = {False: "just inserted", True: "batch norm measured again\non 160 crops, nothing trained"}
LOSSLESS, RANDOM, PLAIN = "#2166ac", "#d6604d", "0.45"
STYLES = {
    "plain": (PLAIN, "-"),
    "eca": (LOSSLESS, "-"),
    "eca-gates-x10": ("#67a9cf", "--"),
    "eca-gates-x50": ("#80cdc1", ":"),
    "eca-random": (RANDOM, "-"),
    "eca-random-recalibrated": ("#f4a582", "--"),
    "se": ("#762a83", "-."),
}


def draw_all(found: dict[str, Any], folder: Path) -> str:
    """Write pretrained.png and pretrained-finetune.png as far as ``found`` has the figures; return Markdown tables."""
    import matplotlib

    matplotlib.use("Agg")
    # A white ground of its own keeps the picture legible on dark pages.
    settings = {"font.size": 15, "figure.facecolor": "white", "savefig.facecolor": "white"}
    tables: list[str] = []
    with matplotlib.rc_context(settings):
        if rows := found.get("pictures"):
            draw_pictures(rows, folder / "pretrained.png")
            tables.append(tabulate_pictures(rows))
        if cells := found.get("finetuning"):
            draw_finetuning(cells, folder / "pretrained-finetune.png")
            tables += [tabulate_finetuning(cells), tabulate_gates(cells)]
    return "\n".join(tables)


def draw_pictures(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how many pictures are right, just inserted and recalibrated: a bar is the mean, a dot is one seed."""
    from matplotlib import pyplot as plt

    total = rows[0]["of"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, constrained_layout=True)
    for axes, (recalibrated, title) in zip(panels, STATES.items(), strict=True):
        for position, arm in enumerate(PICTURE_ARMS):
            right = [row["top1"] for row in rows if (row["arm"], row["recalibrated"]) == (arm, recalibrated)]
            if not right:
                continue
            colour = PLAIN if arm == "plain" else RANDOM if arm.endswith("-random") else LOSSLESS
            axes.barh(position, mean(right), 0.7, color=colour)
            if len(right) > 1:
                axes.plot(right, [position] * len(right), "o", color="black", markersize=5, clip_on=False, zorder=3)
            text = str(right[0]) if min(right) == max(right) else f"{min(right)} to {max(right)}"
            axes.text(max(right) + total / 40, position, text, va="center", fontweight="bold")
        axes.set_title(title, fontsize=16, fontweight="bold")
        axes.set(xlim=(0, 1.3 * total), xticks=range(0, total + 1, 5))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(PICTURE_ARMS)), [NAMES[arm] for arm in PICTURE_ARMS])
    panels[0].invert_yaxis()
    figure.supxlabel(f"right of {total} labelled ImageNet pictures (a dot is one seed)", fontsize=15)
    figure.suptitle("Attention put into torchvision's trained MobileNetV2", fontsize=18)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_finetuning(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against steps for each learning rate, and the distance of the gates from the identity."""
    from matplotlib import pyplot as plt

    rates = sorted({cell["rate"] for cell in cells})
    figure, grid = plt.subplots(2, len(rates), figsize=(5 * len(rates), 8), constrained_layout=True, squeeze=False)
    for (upper, lower), rate in zip(grid.T, rates, strict=True):
        for arm, (colour, style) in STYLES.items():
            mine = select(cells, arm, rate)
            if not mine:
                continue
            steps = [point["step"] for point in mine[0]["points"]]
            curves = [[100 * point["accuracy"] for point in cell["points"]] for cell in mine]
            line = [mean(values) for values in zip(*curves, strict=True)]
            upper.plot(steps, line, style, color=colour, marker="o", markersize=4, linewidth=2, label=NAMES[arm])
            if mine[0]["gates"] and "random" not in arm:
                far = [[gate["mean_distance"] for gate in cell["gates"]] for cell in mine]
                means = [mean(values) for values in zip(*far, strict=True)]
                lower.plot(range(1, len(means) + 1), means, style, color=colour, linewidth=2, label=NAMES[arm])
        seeds = len({cell["seed"] for cell in cells if cell["rate"] == rate})
        upper.set_title(f"learning rate {rate:g}, {seeds} seed{'s' * (seeds > 1)}", fontsize=14)
        upper.set(xlabel="fine-tuning step (batch 64)", ylabel="test accuracy, %")
        lower.set(xlabel="gate, from image to head", ylabel="mean |weight − 1| after 100 steps", yscale="log")
    grid[0][0].legend(fontsize=10, loc="lower right")
    grid[1][0].margins(y=0.45)
    grid[1][0].legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def select(cells: list[dict[str, Any]], arm: str, rate: float) -> list[dict[str, Any]]:
    """Return the cells of ``arm`` at ``rate``, one for each seed."""
    return [cell for cell in cells if (cell["arm"], cell["rate"]) == (arm, rate)]


def tabulate_pictures(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the pictures that are right (top-1, and in brackets top-5), seed by seed."""
    lines = ["| | same outputs | just inserted: top-1 (top-5) | recalibrated: top-1 (top-5) |", "|---|---|---|---|"]
    for arm in PICTURE_ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        equal = "bit for bit" if all(row.get("bit_equal", True) for row in mine) else "no"
        shown = [
            ", ".join(f"{row['top1']} ({row['top5']})" for row in mine if row["recalibrated"] == state)
            for state in STATES
        ]
        lines.append("| " + " | ".join([NAMES[arm], equal, *shown]) + " |")
    return "\n".join(lines) + "\n"


def tabulate_finetuning(cells: list[dict[str, Any]]) -> str:
    """Return a Markdown table: test accuracy in percent by rate and arm, as means over the seeds.

    The last column is the paired difference to the plain network, with the half-width of its 95 % interval (t) where
    there are several seeds.
    """
    steps = [point["step"] for point in cells[0]["points"]]
    head = ["rate", "arm", "parameters added", "seeds", "inserted", *(f"step {step}" for step in steps[1:]), "− plain"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rate in [*sorted({cell["rate"] for cell in cells}), "chosen"]:
        for arm in ARMS:
            mine = choose(cells, arm) if rate == "chosen" else select(cells, arm, rate)
            if not mine:
                continue
            means = [f"{100 * mean(cell['points'][i]['accuracy'] for cell in mine):.1f}" for i in range(len(steps))]
            plain = choose(cells, "plain") if rate == "chosen" else select(cells, "plain", rate)
            difference = "" if arm == "plain" else compare(mine, plain)
            row = [str(rate), NAMES[arm], str(mine[0]["added_parameters"]), str(len(mine)), *means, difference]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def choose(cells: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Return for each seed the cell of ``arm`` whose rate was best on the held-out training images.

    Seeds that lack a rate are left out.
    """
    rates = {cell["rate"] for cell in cells}
    found: list[dict[str, Any]] = []
    for seed in sorted({cell["seed"] for cell in cells}):
        mine = [cell for cell in cells if (cell["seed"], cell["arm"]) == (seed, arm)]
        if len(mine) == len(rates):
            found.append(max(mine, key=lambda cell: cell["held_out"]))
    return found


def compare(mine: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """Return the mean paired difference of the last accuracies in points, with its interval."""
    from scipy.stats import t

    last = {cell["seed"]: cell["points"][-1]["accuracy"] for cell in plain}
    differences = [100 * (cell["points"][-1]["accuracy"] - last[cell["seed"]]) for cell in mine if cell["seed"] in last]
    if len(differences) < 2:
        return "".join(f"{difference:+.1f}" for difference in differences)
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.1f} ± {half:.1f}"


def tabulate_gates(cells: list[dict[str, Any]]) -> str:
    """Return a Markdown table of how far lossless gates moved in 100 steps, as medians over gates and seeds."""
    lines = [
        "| rate | arm | largest parameter | mean \\|weight − 1\\| | deviation between images |",
        "|---|---|---|---|---|",
    ]
    for rate in sorted({cell["rate"] for cell in cells}):
        for arm in ("eca", "eca-gates-x10", "eca-gates-x50", "se"):
            gates = [gate for cell in select(cells, arm, rate) for gate in cell["gates"]]
            if gates:
                keys = ("largest_parameter", "mean_distance", "deviation")
                shown = [f"{median(gate[key] for gate in gates):.2g}" for key in keys]
                lines.append("| " + " | ".join([f"{rate:g}", NAMES[arm], *shown]) + " |")
    return "\n".join(lines) + "\n"
