"""What a reader could not read on a page in a browser: words without contrast, tiny, cut, or on top of each other."""

import base64
import io
import re
from typing import Any

from PIL import Image

SMALLEST = 7.5
"""Height of the em, in pixels, from which a drawing's words can be read on a telephone."""

FIND_WORDS = """
const found = []
const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement
  if (!node.data.trim() || !shown(parent) || parent.closest("svg, script, style")) continue
  const range = document.createRange()
  range.selectNodeContents(node)
  const style = getComputedStyle(parent)
  for (const box of range.getClientRects()) {
    let cut = false
    for (let e = parent; e && e !== document.body; e = e.parentElement) {
      const around = e.getBoundingClientRect()
      if (getComputedStyle(e).overflowX !== "visible" && (box.right > around.right + 1 || box.left < around.left - 1))
        cut = true
    }
    found.push({words: node.data.trim().slice(0, 40), x: box.x + scrollX, y: box.y + scrollY, width: box.width,
                height: box.height, colour: style.color, size: parseFloat(style.fontSize), cut,
                turned: false, drawn: false})
  }
}
document.querySelectorAll("svg g[id^=text_]").forEach((group, at) => {
  const glyphs = group.querySelector("g[style], g[transform]"), box = group.getBoundingClientRect()
  if (!glyphs || !box.width) return
  const matrix = glyphs.getScreenCTM(), comment = [...group.childNodes].find(n => n.nodeType === 8)
  const svg = group.ownerSVGElement.getBoundingClientRect(), place = group.closest(".wide")?.getBoundingClientRect()
  found.push({words: (comment ? comment.data : "").trim(), x: box.x + scrollX, y: box.y + scrollY, width: box.width,
              height: box.height, colour: getComputedStyle(glyphs).fill, size: 100 * Math.hypot(matrix.a, matrix.b),
              cut: box.left < svg.left - 1 || box.right > svg.right + 1 || (place && box.right > place.right + 1) ||
                   box.top < svg.top - 1 || box.bottom > svg.bottom + 1,
              turned: Math.abs(matrix.b) > 1e-6, drawn: group.ownerSVGElement.outerHTML.length + svg.y})
})
return found
"""
"""Each line of text with its box and colour; matplotlib's words are groups of glyphs, 100 units to the em."""

HIDE_WORDS = """
const style = document.createElement("style")
style.textContent = "* { color: transparent !important; transition: none !important; caret-color: transparent } " +
  "svg g[id^=text_] > g:not([id^=patch]) { visibility: hidden }"
document.head.append(style)
"""


def set_screen(browser: Any, width: int, scheme: str) -> None:
    """Give the page ``width`` pixels, as a telephone has them below 500, and the "light" or "dark" scheme."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})  # they are in no picture of a whole page
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find_faults(browser: Any, width: int) -> list[str]:
    """Return what cannot be read on the page that is open, each as one line; the words are hidden afterwards."""
    faults = []
    scroll = browser.execute_script("return document.documentElement.scrollWidth")
    if scroll > width:
        faults.append(f"the page is {scroll} pixels wide")
    words = browser.execute_script(FIND_WORDS)
    assert words
    browser.execute_script(HIDE_WORDS)
    ground = take_picture(browser, width)
    for word in words:
        if word["cut"]:
            faults.append(f"cut: {word['words']}")
        if word["size"] < SMALLEST:
            faults.append(f"{word['size']:.1f} pixels: {word['words']}")
        contrast = find_contrast(ground, word)
        if contrast < 4.5:
            faults.append(f"contrast {contrast:.1f}: {word['words']}")
    drawn = [word for word in words if word["drawn"] and not word["turned"]]
    faults += [f"on each other: {a['words']} and {b['words']}" for i, a in enumerate(drawn) for b in drawn[:i]
               if a["drawn"] == b["drawn"] and meet(a, b)]  # fmt: skip
    return faults


def take_picture(browser: Any, width: int) -> Image.Image:
    """Return the whole page as a picture."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


def find_contrast(ground: Image.Image, word: dict[str, Any]) -> float:
    """Return the contrast of a word to what is behind it: to the darkest and lightest tenth, whichever is worse."""
    box = [round(word["x"]), round(word["y"]), round(word["x"] + word["width"]), round(word["y"] + word["height"])]
    left, top, right, bottom = max(0, box[0]), max(0, box[1]), min(ground.width, box[2]), min(ground.height, box[3])
    if left >= right or top >= bottom:
        return 21.0  # beyond the edge, which is said as a cut
    colours = ground.crop((left, top, right, bottom)).getcolors((right - left) * (bottom - top))
    lights = sorted((brightness(colour), count) for count, colour in colours)
    numbers = [float(n) for n in re.findall(r"[\d.]+", word["colour"])]
    own = brightness(tuple(numbers[:3]))
    return min(ratio(own, find_quantile(lights, share)) for share in (0.1, 0.9))


def find_quantile(lights: list[tuple[float, int]], share: float) -> float:
    """Return the luminance that ``share`` of the pixels do not exceed; ``lights`` are sorted, each with its pixels."""
    wanted = share * sum(count for _, count in lights)
    for light, count in lights:
        wanted -= count
        if wanted <= 0:
            return light
    return lights[-1][0]


def brightness(colour: tuple[float, ...]) -> float:
    """Return the relative luminance of red, green and blue from 0 to 255 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ratio(one: float, other: float) -> float:
    """Return the contrast of two luminances, from 1 to 21."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def meet(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether the boxes of two words share more than a pixel in both directions."""
    across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
    down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
    return across > 1 and down > 1
