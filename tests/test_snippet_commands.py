"""Every command of the pages and of both READMEs has real options, and a recipe if it trains; those that can, run."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from PIL import Image

from ecanet import training
from ecanet.__main__ import main
from ecanet.cli import app
from snippets import PAGES, ROOT, Command, find_commands, find_snippets, split_command
from tiny_runs import TINY, add_tiny, run

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
GROUP = typer.main.get_command(app)
UsageError = typer.BadParameter.__base__  # newer versions of Typer have a click of their own

NOT_RUN = {
    r"weights default|torchvision:(mobilenet|resnet)\S*( |$)(?!.*weights (none|\S+\.pth))": "downloads weights",
    r"^ecanet (bench|ablate)": "takes minutes or days; tests/studies/test_bench.py, test_ablate.py run small ones",
    r"^ecanet app": "waits for a browser; tests/studies/test_app_browser.py",
    r"^ecanet paper( 3 .*(accuracy|speed)| [^3].*|)$": "needs weights, or minutes; tests/studies/test_paper.py",
    r"^ecanet inspect (?!runs/\w+$)": "needs a data set's classes; tests/studies/test_inspect*.py, test_gates.py",
    r"coco:|COCO|scenes|glyphs|imagenet|IMAGENET|fashion|PATH|^ecanet detect": "needs a data set or a detector",
    r"push runs/\w+ me/": "uploads; tests/deploy/test_hub.py",
    r"runs/eca-1 --int8|--logger csv,wandb": "names a run of another page; needs an account",
    r"NAME runs|--model NAME|--attention NAME|RUN|FOLDER|RECIPE|COMMAND|mygates": "has gaps to fill",
    r"^ecanet( (?!doctor)\w+)?( --int8)?$": "is only named, without its arguments",
    r"^ecanet slim": "needs more held-out images than the tiny run has; tests/deploy/test_slim.py",
    r"^ecanet train (?!folder:photos --model (mine|nets/mine)\.py)": "trains; its recipe is looked up",
}
"""Commands that are parsed alone, by pattern, and why. All others run."""

MINUTES = r"^ecanet (train|models|cost|doctor|export|shards|report|paper|inspect)"
"""Commands that run among the slow tests."""

DEPLOY = r"--to (executorch|openvino)"
"""Commands that run where their runtime is, by `make test-deploy`."""

FOREIGN = {
    "--help", "--max-restarts", "--ntasks-per-node", "--part", "--plot", "--rounds", "--runtimes", "--seconds",
    "--shapes", "--standalone", "--strict", "--timm", "--torchvision", "--variants",
}  # fmt: skip
"""Options of other programs and of scripts in benchmarks/."""


def fill_in(words: tuple[str, ...]) -> list[str]:
    """Return a command's words after "ecanet", with values in the place of capitals that stand for them."""
    values = {"SEED": "0", "MODEL": "mask_rcnn", "ATTENTION": "eca", "X": "0.1"}
    return [values.get(word, word.replace("…", "NAME")) for word in words[1:]]


@by_name
def test_every_command_has_real_options(page):
    commands = [c for c in find_commands(page) if c.words[0] == "ecanet" and c.words[1:2] != ("COMMAND",)]
    assert [f"{command.place}: {command.text}: {fault}" for command in commands if (fault := find_fault(command))] == []


def find_fault(command: Command) -> str:
    """Return what the parser says against a command; a command that is only named needs no arguments."""
    try:
        parse(GROUP, "ecanet", fill_in(command.words))
    except typer.Exit:  # --help
        return ""
    except UsageError as error:
        named = command.inline and type(error).__name__ == "MissingParameter"
        return "" if named else error.format_message()
    return ""


def parse(command, name, words, parent=None):
    """Parse a command line and that of its subcommand, without running anything."""
    context = command.make_context(name, list(words), parent)
    if hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if rest:
            name, found, words = command.resolve_command(context, rest)
            parse(found, name, words, context)


@by_name
def test_every_line_of_a_shell_block_is_a_command(page):
    """What `split_command` does not know would be neither parsed nor run."""
    lines = [
        line
        for snippet in find_snippets(page)
        if snippet.language == "bash"
        for line in snippet.code.replace("\\\n", " ").splitlines()
    ]
    assert [line for line in lines if line.strip() and not line.startswith("#") and not split_command(line)] == []


@by_name
def test_every_option_that_a_sentence_names_exists(page):
    known = FOREIGN | {name for command in walk(GROUP) for option in command.params for name in option.opts}
    named = {match[1] for match in re.finditer(r"`(--[a-z][a-z0-9-]*)[ `=]", page.read_text())}
    assert named <= known


def walk(command):
    return [command, *(c for sub in getattr(command, "commands", {}).values() for c in walk(sub))]


@by_name
def test_every_other_command_names_what_is_there(page):
    """Extras of pip, targets of make, scripts and tests.

    They do not run here: pip would change the environment, targets and benchmarks take minutes to hours. Small forms of
    the benchmarks run in tests/studies/test_benchmark_scripts.py, and the tests that a page names are tests.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() | {"NAME"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in find_commands(page):
        for word in command.words:
            if bracket := re.search(r"(?:^\.|ecanet)\[([^]]*)\]", word):
                assert set(bracket[1].split(",")) <= extras, command.place
            if command.words[0] != "ecanet" and word.endswith(".py"):
                assert (ROOT / word).is_file(), command.place
        if command.words[0] == "make":
            assert command.words[1] in targets, command.place


@by_name
def test_every_training_command_finds_its_recipe(page, monkeypatch):
    """Everything up to the first image: the recipe, its settings, the network's options."""
    found = []
    monkeypatch.setattr(training, "run", lambda recipe, **options: found.append(recipe))
    lines = {c.text: fill_in(c.words) for c in find_commands(page) if c.words[:2] == ("ecanet", "train")}
    lines = {text: words for text, words in lines.items() if not re.search(r"--resume|--help|RECIPE|train$", text)}
    for text, words in lines.items():
        monkeypatch.setattr(sys, "argv", ["ecanet", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0, text
    assert len(found) == len(lines)


def copy_photographs(folder: Path) -> None:
    """Make three classes of six small photographs, and single ones under the names that the pages use."""
    from skimage import data

    for name in ("chelsea", "coffee", "rocket"):
        picture = getattr(data, name)()
        for number in range(6):
            path = folder / "photos" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[20 * number : 20 * number + 48, 40 : 40 + 48]).save(path)
    for name in ("image.jpg", "photo.jpg", "shoe.png", "folder/a.jpg", "more/b.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(folder / "photos" / "coffee" / "0.jpg").convert("L").resize((8, 8)).save(folder / name)


NETWORK = """from torch import nn


def make_network(num_classes=10):
    layers = [nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


make = make_network
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the runs, files and photographs that the pages name; the runs are one tiny run."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        add_tiny(patch)
        recipe = TINY.but(model=TINY.model.but(name="resnet8"), epochs=1)
        run(recipe, folder / "runs" / "NAME")
        shutil.copytree(folder / "runs" / "NAME", folder / "runs" / "demo")
        copy_photographs(folder)
        for path in (folder / "mine.py", folder / "nets" / "mine.py"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(NETWORK)
        (folder / "names.txt").write_text("a\nb\nc\n")
        yield folder


def find_tests(text: str) -> str:
    """Return which tests run a command line: "quick", "slow", "deploy" or "none"."""
    if any(re.search(pattern, text) for pattern in NOT_RUN):
        return "none"
    if re.search(DEPLOY, text):
        return "deploy"
    return "slow" if re.search(MINUTES, text) else "quick"


def list_runs(kind: str) -> list[str]:
    """Return the different command lines that tests of a kind run, in the order of the pages."""
    lines = [c.text for page in PAGES for c in find_commands(page) if c.words[0] == "ecanet"]
    return [text for text in dict.fromkeys(lines) if find_tests(text) == kind]


def run_command(text: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    add_tiny(monkeypatch)
    monkeypatch.chdir(workspace)
    words = fill_in(tuple(text.split()))
    if words[:2] == ["shards", "pack"]:  # other pages pack with other settings
        shutil.rmtree(workspace / "packed", ignore_errors=True)
    epochs = ["--epochs", "1"] if words[0] == "train" else []
    monkeypatch.setattr(sys, "argv", ["ecanet", *words, *epochs])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", list_runs("quick"))
def test_a_quick_command_runs(text, workspace, monkeypatch, capsys):
    assert run_command(text, workspace, monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", list_runs("slow"))
def test_a_longer_command_runs(text, workspace, monkeypatch, capsys):
    assert run_command(text, workspace, monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.deploy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", list_runs("deploy"))
def test_a_command_for_another_runtime_runs(text, workspace, monkeypatch, capsys):
    pytest.importorskip("executorch" if "executorch" in text else "openvino")
    assert run_command(text, workspace, monkeypatch) == 0, capsys.readouterr().err
