"""`ecanet app`: what the page says of an image, and the page itself in a real browser (`make test-browser`)."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet.attention import Attention
from ecanet.data.sources import SMALL_SETS
from ecanet.errors import ConfigError, DataError
from ecanet.studies.app import answers, page
from ecanet.training.tasks import build
from tiny_runs import TINY, add_tiny


@pytest.fixture
def task(monkeypatch):
    add_tiny(monkeypatch)
    torch.manual_seed(0)
    return build(TINY, SMALL_SETS["tiny"].spec).eval()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grey.png"
    noise = torch.randint(0, 255, (8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.numpy()).save(path)
    return path


# answers


def test_gates_go_off_from_the_last_one_on(task, picture):
    """Switched off one by one, the classes change with each gate until they are those of the plain network."""
    shown = [answers.answer(task, picture, off) for off in range(len(answers.list_gates(task)) + 1)]
    assert len(shown) == 4
    for one in shown:
        assert one.plain == shown[0].plain
        assert sum(one.classes.values()) == pytest.approx(1)
    assert shown[-1].classes == shown[-1].plain
    grey = torch.from_numpy(np.array(Image.open(picture)))[None, None]
    with torch.no_grad():
        shares = task(task.spec.normalize(grey))[0].softmax(0)
    assert sorted(shown[0].classes.values()) == pytest.approx(sorted(shares.tolist()))
    assert len({tuple(one.classes.values()) for one in shown}) == 4
    # the weights of gates that come before all that are off stay as they are
    first = [dict(one.weights)["layer1.0.eca"] for one in shown]
    assert all(torch.equal(first[0], weights) for weights in first)
    last = [dict(one.weights)["layer3.0.eca"] for one in shown]
    assert torch.equal(last[0], last[1])
    assert not torch.equal(last[0], last[2])


def test_the_network_is_as_it_was_afterwards(task, picture):
    before = {name: value.clone() for name, value in task.state_dict().items()}
    first, again = answers.answer(task, picture), answers.answer(task, picture, 0)
    answers.answer(task, picture, 5)
    assert answers.answer(task, picture).classes == first.classes == again.classes
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert not any(module._forward_hooks for module in task.modules() if isinstance(module, Attention))


def test_a_network_without_gates(monkeypatch, picture):
    add_tiny(monkeypatch)
    plain = build(TINY.but(model=TINY.model.but(attention="none")), SMALL_SETS["tiny"].spec).eval()
    found = answers.answer(plain, picture)
    assert found.classes == found.plain
    assert found.weights == []


def test_the_picture_is_what_the_network_sees(task, picture):
    found = answers.answer(task, picture)
    assert (found.picture.shape, found.picture.dtype) == ((3, 8, 8), torch.uint8)
    assert found.picture.float().std() > 10


def test_a_file_that_is_no_image(task, tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(DataError, match=r"x\.png"):
        answers.answer(task, tmp_path / "x.png")


def test_gates_of_any_width_have_rows_of_one_width():
    stacked = answers.stack_weights([("a", torch.tensor([0.0, 1.0])), ("b", torch.arange(512.0))])
    assert stacked.shape == (2, 256)
    assert stacked[0].tolist() == [0.0] * 128 + [1.0] * 128
    assert stacked[1, :2].tolist() == [0.5, 2.5]


def test_without_gradio(monkeypatch, task):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'ecanet\[app\]'"):
        page.build(task)


class FakePage:
    """Stands for gradio's page: it notes in ``events`` what is done with it."""

    def __init__(self, events, error=None):
        self.events, self.error = events, error

    def launch(self, **settings):
        self.events.append("launched")
        if self.error:
            raise self.error

    def block_thread(self):
        self.events.append("waits")


def test_the_address_is_said_once_the_page_is_there(monkeypatch, task):
    events = []
    monkeypatch.setattr(page, "build", lambda task, files: (FakePage(events), {}))
    page.run(task, port=7999, say=events.append)
    assert events == ["launched", "http://127.0.0.1:7999", "waits"]


def test_no_address_is_said_where_the_port_is_taken(monkeypatch, task):
    events = []
    monkeypatch.setattr(page, "build", lambda task, files: (FakePage(events, OSError("in use")), {}))
    with pytest.raises(ConfigError, match=r"port 7999 cannot be used \(in use\); choose another --port"):
        page.run(task, port=7999, say=events.append)
    assert events == ["launched"]
