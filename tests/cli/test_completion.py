"""`ecanet completion`: bash sources the script and completes by it; the other shells' scripts name the same words."""

import subprocess

import pytest
import typer

from ecanet.cli import app

COMMANDS = typer.main.get_command(app).commands


def complete(script, *words):
    """Return what bash offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in words)
    code = f'{script}\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n_ecanet\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_and_options(ecanet):
    code, script, err = ecanet("completion", "bash")
    assert (code, err) == (0, "")
    assert complete(script, "ecanet", "") == [*COMMANDS, "--help", "--version"]
    assert complete(script, "ecanet", "ex") == ["export"]
    assert complete(script, "ecanet", "export", "--ima") == ["--image-size", "--images"]
    assert complete(script, "ecanet", "shards", "pa") == ["pack"]
    assert complete(script, "ecanet", "nothing", "--") == []
    assert complete(script, "ecanet", "train", "folder:photos", "--auto") == ["--auto-resume"]


@pytest.mark.parametrize(("shell", "mark"), [("zsh", " {})"), ("fish", "subcommand_from {}'")])
def test_other_shells_get_the_same_words(ecanet, shell, mark):
    code, script, err = ecanet("completion", shell)
    assert (code, err) == (0, "")
    assert "--attention" in script
    for name, command in COMMANDS.items():
        (line,) = [line for line in script.splitlines() if mark.format(name) in line]
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert options <= set(line.replace('"', " ").replace("'", " ").split())


def test_another_shell_is_one_line(ecanet):
    code, out, err = ecanet("completion", "tcsh")
    assert (code, out, err) == (2, "", "ecanet: unknown shell 'tcsh'; choose bash, zsh, fish\n")
