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
RATES = {  # arm: factor of the gates' learning rate, colour (of Okabe and Ito's palette), marker
    "eca": (1, "#0072B2", "o"),
    "eca-gates-x10": (10, "#E69F00", "s"),
    "eca-gates-x50": (50, "#009E73", "^"),
}
MOVED = 0.02
"""`ecanet inspect` says of a gate that it has not moved if no weight on any image is this far from 1."""


def draw_all(found: dict[str, Any], folder: Path) -> str:
    """Write the pictures for which ``found`` has the figures into ``folder``; return Markdown tables.

    They are pretrained.png, pretrained-finetune.png and pretrained-gates.png.
    """
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
            draw_gates(cells, folder / "pretrained-gates.png")
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


def draw_gates(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw which gates moved: one panel for each learning rate, one marker for each gate and rate of the gates.

    A marker is the weight that is farthest from 1 on any image, filled if the gate moved. The line below it ends at the
    standard deviation between images. Both are medians over the seeds.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    cells = [cell for cell in cells if cell["arm"] in RATES]
    rates = sorted({cell["rate"] for cell in cells})
    if not rates:
        return
    size = (10, 1.6 + 3.1 * len(rates))
    figure, grid = plt.subplots(len(rates), 1, figsize=size, sharex=True, sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, rate in zip(grid.flat, rates, strict=True):
        draw_rate(axes, [cell for cell in cells if cell["rate"] == rate])
    names = [shorten(gate["name"]) for gate in cells[0]["gates"]]
    grid[-1][0].set_xticks(range(len(names)), names)
    grid[-1][0].set_xlabel("inverted residual block of MobileNetV2 that has the gate, from image to head", fontsize=14)
    figure.supylabel("|weight − 1| after fine-tuning", fontsize=15)
    plain = {"color": "0.3", "linestyle": "none", "marker": "o", "markersize": 8}
    explained = [
        Line2D([], [], **plain, label=f"moved ({MOVED} or more)"),
        Line2D([], [], **plain, markerfacecolor="white", label="not moved"),
        Line2D([], [], color="0.3", label="ends at the deviation between images"),
    ]
    shown: list[Line2D] = []
    for (factor, colour, marker), meaning in zip(RATES.values(), explained, strict=True):
        # A legend fills its columns one after another.
        shown += [Line2D([], [], color=colour, marker=marker, markersize=8, label=f"gates' rate × {factor}"), meaning]
    figure.legend(handles=shown, loc="outside upper center", ncols=3, fontsize=12, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_rate(axes: Any, cells: list[dict[str, Any]]) -> None:
    """Draw the gates of the ``cells`` of one learning rate into one panel; its title says how many moved."""
    moved: list[str] = []
    for shift, (arm, (factor, colour, marker)) in zip((-0.22, 0, 0.22), RATES.items(), strict=True):
        gates = summarize_gates([cell for cell in cells if cell["arm"] == arm])
        for position, gate in enumerate(gates):
            x, far = position + shift, gate["largest_distance"]
            axes.plot([x, x], [gate["deviation"], far], color=colour, linewidth=2)
            fill = colour if far >= MOVED else "white"
            axes.plot(x, far, marker, color=colour, markerfacecolor=fill, markersize=8, zorder=3)
        if gates:
            moved.append(f"{sum(gate['largest_distance'] >= MOVED for gate in gates)} at × {factor}")
    axes.axhline(MOVED, color="0.4", linewidth=1.2, linestyle="--", zorder=0)
    seeds = len({cell["seed"] for cell in cells})
    title = f"learning rate {cells[0]['rate']:g}, {seeds} seed{'s' * (seeds > 1)}"
    axes.set_title(f"{title}: of {len(cells[0]['gates'])} gates moved {', '.join(moved)}", fontsize=14)
    axes.set(yscale="log")
    axes.spines[["top", "right"]].set_visible(False)


def summarize_gates(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return name, largest distance and deviation of each gate, as medians over the ``cells`` of one arm."""
    return [
        {"name": gates[0]["name"]}
        | {key: median(gate[key] for gate in gates) for key in ("largest_distance", "deviation")}
        for gates in zip(*(cell["gates"] for cell in cells), strict=True)
    ]


def shorten(name: str) -> str:
    """Return the number of the block in which the gate ``name`` stands.

    >>> shorten("features.12.conv.4")
    '12'
    """
    return next((part for part in name.split(".") if part.isdigit()), name)


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
