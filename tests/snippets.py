"""Find the code of a page: fenced blocks by language, and the commands in shell blocks and in inline code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "json"}
"""The languages of fences. Fences with output alone are ``text``."""


@dataclass(frozen=True)
class Snippet:
    """A block of code, and where it begins."""

    page: str
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of a page, which a block shows, or a sentence or table names (`inline`)."""

    place: str
    words: tuple[str, ...]
    inline: bool

    @property
    def text(self) -> str:
        return " ".join(self.words)


def find_snippets(path: Path) -> list[Snippet]:
    """Return the fenced blocks of a page, and its indented blocks, which are shell commands (only the READMEs')."""
    found: list[Snippet] = []
    language, begin, code, fenced = None, 0, list[str](), False
    for number, line in enumerate([*path.read_text().splitlines(), "end"], 1):
        ends = line.startswith("```") if fenced else bool(line) and not line.startswith("    ")
        if language is not None and ends:
            found.append(Snippet(path.name, begin, language, "\n".join(code)))
            language = None
            if fenced:
                continue
        if language is not None:
            code.append(line if fenced else line[4:])
        elif line.startswith("```"):
            language, begin, code, fenced = line[3:].strip(), number, [], True
        elif line.startswith("    ") and path.parent == ROOT:
            language, begin, code, fenced = "bash", number, [line[4:]], False
    return found


def find_commands(path: Path) -> Iterator[Command]:
    """Yield the commands of a page's shell blocks, then those that its text names."""
    text = path.read_text()
    for snippet in find_snippets(path):
        if snippet.language == "bash":
            for line in snippet.code.replace("\\\n", " ").splitlines():
                if words := split_command(line):
                    yield Command(snippet.place, words, inline=False)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`([^`]+)`", prose):
        if words := split_command(match[1].replace("\n", " ")):
            yield Command(f"{path.name}: `{match[1]}`", words, inline=True)


def split_command(line: str) -> tuple[str, ...]:
    """Return the words of a command line from its program on, without comment, environment and launcher.

    >>> split_command("OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m ecanet train imagenet …  # on four GPUs")
    ('ecanet', 'train', 'imagenet')
    >>> split_command("srun -n 8 ecanet train … --out runs/a"), split_command("# nothing"), split_command("ecanet.fold")
    (('ecanet', 'train', '--out', 'runs/a'), (), ())
    """
    try:
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
    except ValueError:  # an apostrophe: a sentence, and no command
        return ()
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words.pop(0)
    if words[:1] == ["srun"]:
        words = words[words.index("ecanet") :] if "ecanet" in words else []
    if words[:1] == ["torchrun"]:
        words = words[words.index("-m") + 1 :] if "-m" in words else []
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    return tuple(words) if words[:1] and words[0] in {"ecanet", "pip", "make", "python", "pytest"} else ()
