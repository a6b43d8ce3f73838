"""Draw the pictures of "Understand": `python docs/draw.py` writes docs/*.svg.

Each picture has its own background and follows the reader's light or dark setting. The colours are Okabe and Ito's,
which people tell apart whatever their colour vision; none carries a meaning that a word beside it does not carry too.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ecanet import adaptive_kernel_size

HERE = Path(__file__).parent
WIDTH = 560
STYLE = """
text { font: 17px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1f2328 }
.small { font-size: 15px } .name { font-weight: 600 } .middle { text-anchor: middle } .end { text-anchor: end }
.ground { fill: #ffffff } .box { fill: #f2f4f7; stroke: #57606a; stroke-width: 1.5 }
.line { stroke: #57606a; stroke-width: 2; fill: none } .head { fill: #57606a }
.faint { stroke: #d0d7de; stroke-width: 1 }
.blue { fill: #0072b2 } .orange { fill: #e69f00 } .green { fill: #009e73 } .on { fill: #ffffff } .ink { fill: #10131a }
.curve { stroke: #0072b2; stroke-width: 4; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8ee } .ground { fill: #1d2029 } .box { fill: #2a2e3a; stroke: #9aa3b2 }
  .line { stroke: #9aa3b2 } .head { fill: #9aa3b2 } .faint { stroke: #3a4050 }
  .blue { fill: #56b4e9 } .orange { fill: #e69f00 } .green { fill: #2fc79a } .on { fill: #10131a }
  .curve { stroke: #56b4e9 }
}
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}"/>'


def line(*points: tuple[float, float], kind: str = "line") -> str:
    return f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through ``points`` with a head at its end, which points along the last part."""
    (a, b), (x, y) = points[-2:]
    dx, dy = (x > a) - (x < a), (y > b) - (y < b)
    corners = [(x, y), (x - 10 * dx - 5 * dy, y - 10 * dy - 5 * dx), (x - 10 * dx + 5 * dy, y - 10 * dy + 5 * dx)]
    head = " ".join(f"{p:g},{q:g}" for p, q in corners)
    return line(*points[:-1], (x - 9 * dx, y - 9 * dy)) + f'<polygon points="{head}" class="head"/>'


def labelled(x: float, y: float, width: float, height: float, *lines: str, kind: str = "box") -> str:
    """Return a box with its lines in the middle, the first of them its name."""
    first = y + height / 2 + 6 - 10 * (len(lines) - 1)
    on = "" if kind == "box" else " on"
    words = [
        text(x + width / 2, first + 21 * i, words, f"middle {'name' if i == 0 else 'small'}{on}")
        for i, words in enumerate(lines)
    ]
    return box(x, y, width, height, kind) + "".join(words)


def picture(title: str, height: float, parts: Sequence[str]) -> str:
    """Return the text of an SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n"
        f'<rect width="{WIDTH}" height="{height:g}" rx="10" class="ground"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def draw_module() -> str:
    maps = [box(34 + 7 * i, 46 + 7 * i, 74, 74, "box") for i in range(3)]
    scaled = [box(446 + 7 * i, 46 + 7 * i, 74, 74, kind) for i, kind in enumerate(("blue", "orange", "green"))]
    return picture(
        "Squeeze, gate, scale",
        268,
        [
            *maps, text(78, 30, "x   (N, C, H, W)", "middle"),
            arrow((85, 134), (85, 178)),
            labelled(24, 178, 122, 62, "squeeze", "mean of x"),
            arrow((146, 209), (206, 209)),
            text(176, 199, "p", "middle small"), text(176, 231, "(N, C)", "middle small"),
            labelled(206, 178, 148, 62, "gate", "σ(conv1d p)"),
            arrow((354, 209), (414, 209)),
            text(384, 199, "g", "middle small"), text(384, 231, "(N, C)", "middle small"),
            labelled(414, 178, 122, 62, "scale", "x times g"),
            line((122, 90), (280, 90)), arrow((280, 90), (420, 90), (420, 150), (440, 150), (440, 178)),
            text(262, 80, "x again, a second reading", "middle small"),
            arrow((497, 178), (497, 140)),
            *scaled, text(490, 30, "y   (N, C, H, W)", "middle"),
        ],
    )  # fmt: skip


def draw_tail() -> str:
    return picture(
        "The tail of a residual block in two passes over memory",
        330,
        [
            text(24, 34, "y = relu(gate(mean b) b + shortcut),   b = norm(z)", "name"),
            labelled(24, 58, 150, 64, "z", "N C H W numbers"),
            arrow((174, 90), (254, 90)), text(214, 80, "pass 1", "middle small name"),
            labelled(254, 58, 282, 64, "one reduction", "m, v of each plane: N C numbers"),
            arrow((395, 122), (395, 156)),
            labelled(254, 156, 282, 64, "algebra", "μ, var, r, p, gate(p): N C numbers", kind="blue"),
            arrow((395, 220), (395, 254)),
            labelled(254, 254, 282, 56, "y", "relu(A (z − μ) + B + shortcut)"),
            arrow((99, 122), (99, 282), (254, 282)), text(176, 272, "pass 2", "middle small name"),
            text(24, 304, "+ shortcut", "small"),
        ],
    )  # fmt: skip


def draw_proof() -> str:
    left, right, width = 24, 296, 240
    remedies = "another place, or left out and listed,", "or all undone: one line names the site"
    return picture(
        "What attach does before it returns",
        336,
        [
            labelled(left, 24, width, 62, "run the network", "record additions and outputs"),
            arrow((left + width, 55), (right, 55)),
            labelled(right, 24, width, 62, "put the gates in", "each is 2 σ(0) = 1", kind="blue"),
            arrow((right + 120, 86), (right + 120, 118)),
            labelled(right, 118, width, 62, "run it again", "the same input"),
            arrow((right, 149), (left + width, 149)),
            labelled(left, 118, width, 62, "compare", "outputs, calls of each gate"),
            arrow((left + 60, 180), (left + 60, 232)), text(left + 70, 212, "equal", "small"),
            labelled(left, 232, 120, 80, "done", "model is", "returned", kind="green"),
            arrow((left + 190, 180), (left + 190, 232)), text(left + 200, 212, "else", "small"),
            labelled(left + 144, 232, 368, 80, "not there", *remedies),
        ],
    )  # fmt: skip


def draw_kernel_sizes() -> str:
    """Draw k over C on a logarithmic axis, by the library's own function."""
    left, right, bottom, top, high = 60, 528, 236, 44, 9
    powers = range(13)

    def place(power: float, k: float) -> tuple[float, float]:
        return left + (right - left) * power / 12, bottom - (bottom - top) * k / high

    points = [(power, adaptive_kernel_size(2**power)) for power in powers]
    steps: list[tuple[float, float]] = []
    for (power, k), (following, _) in zip(points, [*points[1:], (12, 0)], strict=True):
        steps += [place(power, k), place(following, k)]
    parts = [text(24, 28, "k", "name"), text(right, 290, "channels C", "end name")]
    for k in (1, 3, 5, 7, 9):
        x, y = place(0, k)
        parts += [line((x, y), (right, y), kind="faint"), text(x - 14, y + 6, str(k), "end")]
    for power in powers[::2]:
        x, _ = place(power, 0)
        parts += [line((x, bottom), (x, bottom + 6)), text(x, bottom + 26, f"{2**power}", "middle")]
    firsts = {k: power for power, k in reversed(points)}
    marks = [text(*(place(firsts[k] + 0.1, k + 0.5)), f"{k} from C = {2 ** firsts[k]}", "small") for k in (3, 5)]
    x, y = place(firsts[7], 7.5)
    return picture(
        "The kernel size k over the number of channels C",
        304,
        [*parts, line((left, top), (left, bottom), (right, bottom)), line(*steps, kind="curve"), *marks,
         text(x + 40, y, f"7 from C = {2 ** firsts[7]}", "small end")],
    )  # fmt: skip


def read_passes() -> list[tuple[str, float, float]]:
    """Return the table of docs/performance.md: implementation, passes forward, passes backward (the larger, of two)."""
    section = (HERE / "performance.md").read_text().split("## Passes over a block's output")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d. to]+) \|", section, re.MULTILINE)
    return [(name.replace("`", ""), float(a), float(b.split()[-1])) for name, a, b in rows]


def draw_passes() -> str:
    rows, unit = read_passes(), 15
    parts = [
        text(24, 34, "Passes over a block's output", "name"),
        box(24, 52, 18, 18, "blue"), text(50, 67, "forward", "small"),
        box(130, 52, 18, 18, "orange"), text(156, 67, "backward", "small"),
    ]  # fmt: skip
    for number, (name, forward, backward) in enumerate(rows):
        y = 90 + 58 * number
        parts += [
            text(24, y + 14, name, "small"),
            box(24, y + 22, unit * forward, 22, "blue"), text(30, y + 39, f"{forward:g}", "small on"),
            box(24 + unit * forward + 2, y + 22, unit * backward, 22, "orange"),
            text(30 + unit * forward + 2, y + 39, f"{backward:g}", "small ink"),
        ]  # fmt: skip
    return picture("Passes over a block's output, forward and backward", 90 + 58 * len(rows) + 8, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "squeeze-gate-scale.svg": draw_module,
    "block-tail.svg": draw_tail,
    "proof.svg": draw_proof,
    "kernel-size.svg": draw_kernel_sizes,
    "passes.svg": draw_passes,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())
