"""The squeeze-excite of PP-OCR's text detector, a graph from ONNX, on text and with noise beside it."""

import pytest
import torch
from PIL import Image, ImageDraw

import ecanet
from surgery.test_onnx_networks import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def write_text(seed):
    """Return an image (3, 96, 96) of two lines of text, dark on bright or bright on dark."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 26, (2, 8), generator=generator).tolist()
    dark, bright = torch.randint(0, 90, (1,), generator=generator).item(), 255 - seed % 60
    picture = Image.new("L", (96, 96), bright if seed % 3 else dark)
    for line, letters in enumerate(numbers):
        text = "".join(chr(97 + letter) for letter in letters)
        ImageDraw.Draw(picture).text((4 + seed % 20, 10 + 40 * line), text, dark if seed % 3 else bright, font_size=16)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(96, 96).float() / 255
    return ((pixels - 0.5) / 0.5).expand(3, -1, -1)


def find_text(output):
    """Return the pixels that PP-OCR takes for text."""
    return (output[:, 0] if isinstance(output, torch.Tensor) else output[0][:, 0]) > 0.3


def draw_noise():
    """Return 32 images of pixels that are black or white."""
    pixels = torch.randint(0, 2, (32, 1, 96, 96), generator=torch.Generator().manual_seed(0))
    return (2.0 * pixels - 1).expand(-1, 3, -1, -1)


def test_the_gates_of_a_graph_are_folded():
    """Eight of them are of the form x + x g(x). Finding text, the network can do without any of the ten."""
    model, _, _, count = load("detector")
    text = torch.stack([write_text(seed) for seed in range(64)])
    slimmed, report = ecanet.slim(model, text, budget=0.15, also={"noise": draw_noise()}, decide=find_text)
    assert len(report.folded) == len(report.gates) == count == 10
    assert 0 < report.changed.share < 0.01
    assert report.also["noise"].share == 0
    with torch.no_grad():
        changed = (find_text(slimmed(text[1::2])) != find_text(model(text[1::2]))).double().mean()
    assert report.changed.share == pytest.approx(float(changed), abs=1e-4)


def round_scores(output):
    """Return the logits to the nearest whole number: decisions that see smaller changes than where text is found."""
    return output[:, 0].round().long()


def test_a_gate_that_is_constant_on_text_is_kept_where_noise_moves_it():
    model, _, _, _ = load("detector")
    text = torch.stack([write_text(seed) for seed in range(64)])
    _, alone = ecanet.slim(model, text, budget=0.15, decide=round_scores)
    (constant,) = alone.folded
    assert constant.spread < 1e-3
    normal = torch.randn((32, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    _, still = ecanet.slim(model, text, budget=0.15, also={"noise": normal}, decide=round_scores)
    assert [gate.name for gate in still.folded] == [constant.name]
    _, report = ecanet.slim(model, text, budget=0.15, also={"noise": draw_noise()}, decide=round_scores)
    assert report.folded == []
    (kept,) = (gate for gate in report.gates if gate.name == constant.name)
    assert "of decisions change on noise" in kept.reason
