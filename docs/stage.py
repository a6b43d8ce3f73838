"""Prepare the documentation site in build/docs: the pages of docs/, what they link to, and generated reference pages.

`make docs` runs this and then zensical. The pages stay readable in the repository; here links to files outside docs/
lead to copies, and the reference is written from the docstrings and from the commands' own help.
"""

import re
import shutil
import sys
from pathlib import Path

import typer

import ecanet
from ecanet.cli import COMMANDS, app

ROOT = Path(__file__).resolve().parents[1]

REFERENCE: dict[str, tuple[str, ...]] = {
    "modules": (
        "ECA", "ECANS", "SE", "SEGC", "SEVar1", "SEVar2", "SEVar3", "ChannelAttention", "adaptive_kernel_size",
        "make_attention", "list_attentions",
    ),
    "attach": ("attach", "attached", "detach", "fold", "parameter_groups"),
    "networks": ("create_model", "list_models", "load_checkpoint"),
    "elsewhere": (),
    "training": (
        "training.run", "training.restore", "training.evaluate", "training.predict", "training.detect",
        "training.remake_report", "recipes.Recipe", "recipes.find",
    ),
}  # fmt: skip
"""Public names by page; "elsewhere" has all that no other page has: faster and exported forms of a network."""

TITLES = {
    "modules": "Modules",
    "attach": "attach",
    "networks": "Networks and weights",
    "elsewhere": "Faster forms, and other runtimes",
    "training": "Training",
}


def main(target: Path) -> None:
    """Write all pages into ``target``, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in list(target.rglob("*.md")):
        page.write_text(name_pages(copy_linked_files(page.read_text(), target)))
    (target / "reference").mkdir()
    for name, text in write_reference().items():
        (target / "reference" / f"{name}.md").write_text(text)
    (target / "reference" / "commands.md").write_text(write_commands())


def copy_linked_files(text: str, target: Path) -> str:
    """Copy the files outside docs/ that ``text`` links to, and return it with links to the copies."""

    def replace(match: re.Match[str]) -> str:
        _copy(match[1], target)
        return f"](files/{match[1]})"

    return re.sub(r"\]\(\.\./([^)#]+)(?:#[^)]*)?\)", replace, text)


def name_pages(text: str) -> str:
    """Return ``text`` in which a link called like its file (``slim.md``) is called like its page.

    >>> name_pages("See [hub.md](hub.md#any-network).")
    'See [Networks for other people](hub.md#any-network).'
    """

    def replace(match: re.Match[str]) -> str:
        title = (ROOT / "docs" / match[1]).read_text().split("\n", 1)[0].removeprefix("# ")
        return f"[{title}]({match[2]})"

    return re.sub(r"\[([\w.-]+\.md)\]\((\1[^)]*)\)", replace, text)


def _copy(path: str, target: Path) -> None:
    """Copy the file ``path`` of the repository; links of a copied page lead to the pages, or to further copies."""
    copy = target / "files" / path
    if copy.exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, copy)
    if copy.suffix == ".md":
        text = re.sub(r"\]\(docs/([^)]+)\)", r"](../\1)", copy.read_text())
        copy.write_text(text)
        for other in re.findall(r"\]\(([A-Z]+\.md)\)", text):
            _copy(other, target)


def write_reference() -> dict[str, str]:
    """Return a page for each group of public names; mkdocstrings fills in the docstrings.

    Every name of ``ecanet.__all__`` has its place.
    """
    placed = {name for names in REFERENCE.values() for name in names}
    rest = tuple(name for name in ecanet.__all__ if name not in placed)
    pages: dict[str, str] = {}
    for page, names in REFERENCE.items():
        entries = "\n\n".join(f"::: ecanet.{name}" for name in names or rest)
        pages[page] = f"# {TITLES[page]}\n\n{entries}\n"
    return pages


def write_commands() -> str:
    """Return a page with what each command's ``--help`` says: its purpose, arguments and options."""
    group = typer.main.get_command(app)
    parts = ["# Commands", "A network, a device and a data set are called the same in every command."]
    for name, command in group.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for path, one in [(name, command), *((f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items())]:
            rows = [
                f"| `{', '.join(parameter.opts)}` | {getattr(parameter, 'help', '') or ''} |"
                for parameter in one.params
            ]
            table = ["| argument or option | |", "|---|---|", *rows] if rows else []
            parts += [f"## ecanet {path}", (one.help or "").strip(), "\n".join(table)]
    assert set(COMMANDS) <= set(group.commands)  # pyright: ignore[reportAttributeAccessIssue]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
