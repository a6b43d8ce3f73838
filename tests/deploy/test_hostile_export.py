"""`export` gives a right file or one line for odd paths, names, images and networks, and replaces nobody's file."""

import threading
import weakref

import pytest
import torch
from torch import nn

import ecanet
from ecanet import deploy
from ecanet.deploy import checking, exporting, preparation, programs, targets
from ecanet.deploy.value_reads import reads_values
from ecanet.errors import ConfigError, EcanetError, ExportError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0)


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), ecanet.ECA(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


class Around(nn.Module):
    """A network whose forward is ``step(network, x)``."""

    def __init__(self, step):
        super().__init__()
        self.network, self.step = make(), step
        self.register_buffer("one", torch.ones(()))
        self.eye = torch.eye(4)  # kept beside the buffers: double() leaves it alone

    def forward(self, x):
        return self.step(self.network, x) if self.step.__code__.co_argcount == 2 else self.step(self, self.network, x)


def export(model, path, **settings):
    return ecanet.export(model, path, **{"target": "torchscript", "example": X, **settings})


PATHS = {
    "": "path '' names no file; write model.pt",
    ".": "path '.' names no file",
    "..": "path '..' names no file",
    "/": "path '/' names no file",
    "a\0b.pt": r"path must be the name of a file, got 'a\\x00b\.pt'",
    "a\udc80.pt": "path must be the name of a file, got 'a",
    None: "path must be the name of a file, got None",
    b"model.pt": "path must be the name of a file, got b'model.pt'",
}


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_what_names_no_file_is_one_line(path):
    with pytest.raises(ConfigError, match=PATHS[path]) as caught:
        export(make(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("target", "second"), [("openvino", "net.bin"), ("executorch", "net.json")])
def test_the_second_file_of_a_target_replaces_nobodys(target, second, tmp_path):
    goal = targets.TARGETS[target]
    path, other = tmp_path / f"net{goal.suffix}", tmp_path / second
    other.write_text("somebody's")
    with pytest.raises(ConfigError, match=f"{second} exists without {path.name}, and would be replaced; move it"):
        exporting.check_place(path, goal)
    path.write_text("an older export, with its second file")
    assert exporting.check_place(path, goal) == path


def test_a_class_name_that_is_no_text_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"class name 'd\\udc80' is no Unicode text"):
        export(make(), tmp_path / "model.pt", classes=("a", "b", "c", "d\udc80"))


@pytest.mark.parametrize(
    ("example", "message"),
    [(X.to("meta"), "example has no data"), (X[:0], r"example is empty \(0x3x16x16\); pass at least one image")],
)
def test_an_example_without_data_is_one_line(example, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(make(), tmp_path / "model.pt", example=example)


def test_a_network_that_cannot_be_copied_is_one_line(tmp_path):
    model = make()
    model.lock = threading.Lock()
    for use in (lambda: export(model, tmp_path / "model.pt"), lambda: ecanet.optimize(model, example=X)):
        with pytest.raises(ConfigError, match="Sequential cannot be copied .*lock.*; take what holds it out"):
            use()


def test_the_example_and_the_random_state_are_not_changed(tmp_path):
    example = X.clone()
    report = export(Around(lambda network, x: network(x.mul_(2))), tmp_path / "model.pt", example=example)
    assert torch.equal(example, X)
    assert all(c.allowed < 1e-5 for c in report.comparisons), "float64 gets the same images as float32"
    model, state = make(), torch.random.get_rng_state()
    export(model, tmp_path / "model.pt", check=False)
    assert torch.equal(state, torch.random.get_rng_state())


def count(self, network, x):
    self.one += 1
    return network(x) * self.one


CHANGING = {
    "dropout": lambda network, x: nn.functional.dropout(network(x), training=True),
    "noise": lambda network, x: network(x + 0.1 * torch.randn_like(x)),
    "counter": count,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_outputs_that_change_from_run_to_run_prove_nothing(kind, tmp_path):
    with pytest.raises(ExportError, match=r"Around returns other numbers when it runs .* again .*check=False"):
        export(Around(CHANGING[kind]), tmp_path / "model.pt")
    assert not export(Around(CHANGING[kind]), tmp_path / "model.pt", check=False).checked


def test_a_bound_that_lets_everything_pass_is_refused(tmp_path):
    model = Around(lambda network, x: (network(x) + 1e7) - 1e7)
    with pytest.raises(ExportError, match=r"float32 are off by .* from those in float64, so that the file of Around"):
        export(model, tmp_path / "model.pt")


SINGLE = {
    "float": lambda network, x: network(x.float()),
    "to": lambda network, x: network(x.to(torch.float32)),
    "dtype": lambda network, x: network(x) @ torch.eye(4, dtype=torch.float32),
    "default": lambda network, x: network(x) @ torch.eye(4),
    "kept": lambda self, network, x: network(x) @ self.eye,
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_forward_that_asks_for_float32_is_checked(kind, tmp_path):
    report = export(Around(SINGLE[kind]), tmp_path / "model.pt")
    assert all(c.passed and c.allowed < 1e-5 for c in report.comparisons)
    assert torch.get_default_dtype() == torch.float32
    with programs.Float64():
        exact = programs.widen(Around(SINGLE[kind]))(X.double())
    assert exact.dtype == torch.float64


def test_what_does_not_run_in_float64_is_one_line(tmp_path):
    hidden = [torch.eye(4)]
    with pytest.raises(ExportError, match="Around does not run in float64, beside which .*; let it take the dtype"):
        export(Around(lambda network, x: network(x) @ hidden[0]), tmp_path / "model.pt")


def open_fake(*outputs):
    return programs.Session(run=lambda inputs: outputs, operations={})


@pytest.mark.parametrize("logits", [True, False])
def test_labels_and_masks_are_compared(logits):
    model = Around(lambda network, x: (network(x), network(x).argmax(1)) if logits else network(x).argmax(1)).eval()
    exact, inputs = programs.widen(model), [X]
    right = programs.run_network(model, inputs)
    wrong = (*right[:-1], (right[-1] + 1) % 4)
    assert checking.compare(open_fake(*right), model, exact, inputs).passed
    assert not checking.compare(open_fake(*wrong), model, exact, inputs).passed
    if logits:
        assert checking.compare(open_fake(*right), model, exact, inputs).allowed < 1e-5


def write(value, where=None):
    """Write the element of ``value`` into other memory, through a view or by an operation without a result."""
    z = torch.zeros(2)
    if where is None:
        torch._foreach_copy_([z], [value.expand(2)])
    else:
        z[where] = value
    return z[0]


READS = {
    "condition": lambda network, x: network(x) if x.abs().max() < 20 else -network(x),
    "number": lambda network, x: network(x) * x.max().item(),
    "written": lambda self, network, x: -network(x) if write(x[0, 0, 0, :1], slice(1)) > 20 else network(x),
    "written by a list": lambda self, network, x: -network(x) if write(x[0, 0, 0, :1]) > 20 else network(x),
}


@pytest.mark.parametrize("kind", READS)
def test_a_trace_of_steps_that_depend_on_values_is_refused(kind, tmp_path):
    """Random images would all take one side of the condition, and the check would pass."""
    with pytest.raises(ExportError, match=r"forward of Around reads values of the images .* torch\.where"):
        export(Around(READS[kind]), tmp_path / "model.pt", check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["torch-export", "onnx"])
def test_a_graph_of_steps_that_depend_on_values_is_refused_in_one_line(target, tmp_path, capfd):
    pytest.importorskip("onnxscript" if target == "onnx" else "torch")
    path = tmp_path / f"model{targets.TARGETS[target].suffix}"
    with pytest.raises(ExportError, match=r"forward of Around reads values of the images .* torch\.where"):
        export(Around(READS["condition"]), path, target=target)
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_numbers_from_shapes_and_buffers_are_no_values_of_images(tmp_path):
    model = Around(lambda self, network, x: network(x) * float(self.one) if x.shape[1] == 3 and self.one > 0 else x)
    export(model, tmp_path / "model.pt", check=False)
    assert torch.allclose(torch.jit.load(str(tmp_path / "model.pt"))(X), model(X), atol=1e-6)


def test_a_dictionary_of_outputs_is_traced(tmp_path):
    model = Around(lambda network, x: {"out": network(x), "aux": 2 * network(x)})
    report = export(model, tmp_path / "model.pt")
    assert all(c.passed for c in report.comparisons)
    found = torch.jit.load(str(tmp_path / "model.pt"))(X)
    assert torch.allclose(found["aux"], 2 * found["out"])


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.Sequential(torch.compile(m[0]), m[1:])])
def test_a_compiled_network_is_exported_as_it_was(wrap):
    model = wrap(make())
    copied = preparation.copy_unwrapped(model)
    assert not {type(m).__name__ for m in copied.modules()} & set(preparation.WRAPPERS)
    assert torch.allclose(copied(X), make()(X), atol=1e-6)
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    if type(model).__name__ in preparation.WRAPPERS:
        with pytest.raises(ConfigError, match="has a hook, which would be lost"):
            preparation.copy_unwrapped(model)


@pytest.mark.slow
def test_a_network_on_sequences_takes_other_batches_and_lengths_in_onnx(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv1d(3, 8, 3), ecanet.ECA(8), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))
    report = export(model, tmp_path / "model.onnx", target="onnx", example=X[..., 0])
    assert [c.shape for c in report.comparisons] == [(1, 3, 16), (2, 3, 16), (1, 3, 48), (2, 3, 48)]
    assert report.notes == ()


def test_quantize_takes_the_same_care_of_paths():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(EcanetError, match="path '' names no file"):
        deploy.quantize(make(), "", target="onnx", calibration=X, held_out=(X, labels))


def test_the_search_for_value_reads_keeps_no_activations():
    alive, live = weakref.WeakSet(), []

    def note(*args):
        alive.add(args[-1].untyped_storage())
        live.append(len(alive))

    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(9)))
    for layer in model:
        layer.register_forward_hook(note)
    assert not reads_values(model, [torch.randn(1, 3, 40, 40)])
    assert len(live) == 9
    assert max(live) <= 3
