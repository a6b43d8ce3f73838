"""The page: drop an image, see classes, heat map and gates, and turn the gates off one by one.

It is served to this machine alone (127.0.0.1), asks no other server, and sends nothing anywhere. Uploads are bounded,
and one image is answered at a time, because switching gates off changes the network.
"""
# gradio and matplotlib leave many types open:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ecanet.errors import ConfigError, DataError
from ecanet.report import figures
from ecanet.studies.app.answers import Answer, answer, detect_objects, list_gates, stack_weights
from ecanet.training import Classification, Task, image_files

__all__ = ["build", "run"]

LARGEST_FILE = "25mb"
MOST_IMAGES = 200
"""Images of a folder that the page offers."""

NOTHING_SENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(
    task: Task,
    *,
    images: str | Path | None = None,
    port: int = 7860,
    show: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve the page of the restored ``task`` at http://127.0.0.1:PORT until Ctrl-C.

    Args:
        task: as `ecanet.training.restore` returns it.
        images: a folder of images to offer.
        port: the port; if it is taken, the page is refused.
        show: open the page in the browser.
        say: called with the page's address once it can be opened.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
        DataError: ``images`` has no images.
    """
    files = image_files(images)[:MOST_IMAGES] if images is not None else []
    page, settings = build(task, files)
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, inbrowser=show, quiet=True, prevent_thread_lock=True, **settings
        )
    except OSError as error:
        raise ConfigError(f"port {port} cannot be used ({error}); choose another --port") from None
    say(f"http://127.0.0.1:{port}")
    page.block_thread()


def build(task: Task, files: Sequence[Path] = ()) -> tuple[Any, dict[str, Any]]:
    """Return the page (gradio's Blocks) and the arguments of its ``launch``, which keep it on this machine."""
    gradio = load_gradio()
    name = task.recipe.model.name
    with gradio.Blocks(title=f"ecanet: {name}", analytics_enabled=False) as page:
        gradio.Markdown(f"## {name} with {task.recipe.model.attention}, trained on {task.recipe.data.name}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=320)
                if files:
                    gallery = gradio.Gallery([str(file) for file in files], label="Folder", columns=5, height=300)
                    gallery.select(_make_chooser(gradio, files), None, image, api_visibility="private")
            with gradio.Column():
                if isinstance(task, Classification):
                    _add_classifier(gradio, task, image)
                else:
                    _add_detector(gradio, task, image)
    page.queue(default_concurrency_limit=1, max_size=32)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    settings = {
        "share": False,
        "max_file_size": LARGEST_FILE,
        "allowed_paths": [str(file) for file in files],
        "footer_links": [],
        "theme": gradio.themes.Default(**fonts),
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
    }
    return page, settings


def load_gradio() -> Any:
    """Return the package gradio, which is told to send nothing before it is imported.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.update(NOTHING_SENT)
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError("the page needs gradio: pip install 'ecanet[app]'") from None
    return gradio


def _make_chooser(gradio: Any, files: Sequence[Path]) -> Callable[[Any], str]:
    """Return the function that is called when a picture of the folder is chosen."""

    def choose(event: Any) -> str:
        return str(files[event.index])

    choose.__annotations__ = {"event": gradio.SelectData}  # gradio passes the event by this annotation
    return choose


def _add_classifier(gradio: Any, task: Classification, image: Any) -> None:
    """Add the answers of a classifier, and a slider that turns its gates off from the last on."""
    gates = len(list_gates(task))
    slider = gradio.Slider(0, max(1, gates), value=0, step=1, label="Gates off, from the last on", visible=gates > 0)
    with gradio.Row():
        classes = gradio.Label(label="Classes")
        plain = gradio.Label(label="Classes with every gate off", visible=gates > 0)
    has_maps = importlib.util.find_spec("pytorch_grad_cam") is not None
    gradio.Markdown(
        "Where it looks (Grad-CAM)" if has_maps else "As the network sees it (maps: pip install 'ecanet[cam]')"
    )
    heat = gradio.Image(show_label=False, interactive=False, height=260, buttons=["fullscreen"])
    gradio.Markdown("Weights of the gates, one row each", visible=gates > 0)
    weights = gradio.Image(show_label=False, interactive=False, visible=gates > 0, buttons=["fullscreen"])

    def show(path: str | None, off: float) -> tuple[object, ...]:
        if path is None:
            return None, None, None, None
        try:
            found = answer(task, path, int(off))
        except DataError as error:
            raise gradio.Error(_shorten(error, path), duration=None, print_exception=False) from None
        return found.classes, found.plain, _draw_heat(found), _draw_weights(found)

    outputs = [classes, plain, heat, weights]
    _connect(gradio, [image.change, slider.change], show, [image, slider], outputs)


def _add_detector(gradio: Any, task: Task, image: Any) -> None:
    """Add the objects of a detector, and a slider for the lowest score."""
    threshold = gradio.Slider(0.05, 0.95, value=0.5, step=0.05, label="Lowest score")
    picture = gradio.Image(label="Objects", interactive=False, buttons=["fullscreen", "download"])
    table = gradio.Dataframe(headers=["object", "score"], label="Objects", interactive=False)

    def show(path: str | None, lowest: float) -> tuple[object, ...]:
        if path is None:
            return None, None
        try:
            found = detect_objects(task, path, lowest)
        except DataError as error:
            raise gradio.Error(_shorten(error, path), duration=None, print_exception=False) from None
        return found.picture.permute(1, 2, 0).numpy(), [[name, f"{score:.2f}"] for name, score in found.objects]

    _connect(gradio, [image.change, threshold.change], show, [image, threshold], [picture, table])


def _connect(
    gradio: Any, events: list[Any], show: Callable[..., object], inputs: list[Any], outputs: list[Any]
) -> None:
    """Call ``show`` at each of ``events``; of those that come while it runs, only the last counts."""
    gradio.on(
        events, show, inputs, outputs, show_progress="minimal", trigger_mode="always_last", api_visibility="private"
    )


def _shorten(error: DataError, path: str) -> str:
    """Return the message with the file's name alone: the folder is a temporary one."""
    return str(error).replace(path, Path(path).name)


def _draw_heat(found: Answer) -> object:
    """Return the image with its class-activation map over it; the image alone if there is no map."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(4, 4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(found.picture.permute(1, 2, 0).numpy())
    if found.heat is not None:
        axes.imshow(found.heat.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    axes.set_axis_off()
    return Image.open(io.BytesIO(figures.to_png(figure, dpi=110)))


def _draw_weights(found: Answer) -> object:
    """Return a picture with one row for each gate, its channels from left to right; None without channel gates."""
    from matplotlib.figure import Figure

    if not found.weights:
        return None
    figure: Any = Figure(figsize=(7, 1 + 0.28 * len(found.weights)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(stack_weights(found.weights).numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(found.weights)), [name for name, _ in found.weights], fontsize=7)
    axes.set_xticks([])
    axes.set_xlabel("channels, averaged to one width")
    figure.colorbar(shown, ax=axes)
    return Image.open(io.BytesIO(figures.to_png(figure, dpi=110)))
