"""The command `ecanet completion`: a script with which a shell completes commands and options.

The script is static. The completion that comes with typer starts Python at every press of Tab, which takes seconds here
because PyTorch is imported; shtab and argcomplete read argparse's parsers alone.
"""

from typing import Annotated, Any

import typer

from ecanet.errors import ConfigError

__all__ = ["completion"]

SHELLS = ("bash", "zsh", "fish")


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")] = "bash",
) -> None:
    """Print a completion script for your shell.

    bash: ecanet completion bash >> ~/.bash_completion
    zsh: ecanet completion zsh >> ~/.zshrc
    fish: ecanet completion fish > ~/.config/fish/completions/ecanet.fish
    """
    if shell not in SHELLS:
        raise ConfigError(f"unknown shell {shell!r}; choose {', '.join(SHELLS)}")
    words = list_words(context.find_root().command)
    print(write_fish(words) if shell == "fish" else write_bash(words, zsh=shell == "zsh"), end="")


def list_words(group: Any) -> dict[str, list[str]]:
    """Return what can follow each command: its options, or the commands that it has; "" stands for `ecanet` itself."""
    words = {"": [*group.commands, "--help", "--version"]}
    for name, command in group.commands.items():
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        words[name] = [*getattr(command, "commands", {}), *options, "--help"]
    return words


def write_bash(words: dict[str, list[str]], *, zsh: bool) -> str:
    """Return a script for bash, which zsh runs by its own bashcompinit."""
    cases = "\n".join(f'    {name or "ecanet"}) words="{" ".join(found)}" ;;' for name, found in words.items())
    head = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if zsh else ""
    return f"""{head}_ecanet() {{
  local words current="${{COMP_WORDS[COMP_CWORD]}}" command="ecanet"
  if [ "$COMP_CWORD" -gt 1 ]; then command="${{COMP_WORDS[1]}}"; fi
  case "$command" in
{cases}
    *) words="" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ecanet ecanet
"""


def write_fish(words: dict[str, list[str]]) -> str:
    """Return a script for fish."""
    lines = [f"complete -c ecanet -n __fish_use_subcommand -a '{' '.join(words[''])}'"]
    for name, found in words.items():
        if name:
            lines.append(f"complete -c ecanet -n '__fish_seen_subcommand_from {name}' -a '{' '.join(found)}'")
    return "\n".join(lines) + "\n"
