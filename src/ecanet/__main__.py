"""The entry point of the command line. It prints a user's mistake as one line on standard error.

Exit codes: 0 for success, 2 for a user's mistake, 130 for Ctrl-C. `ecanet.training` ends a run with 143 on SIGTERM.
"""

import os
import select
import sys
from typing import NoReturn, cast

from ecanet.errors import EcanetError

__all__ = ["main"]

TRAIN_EXTRA = {
    "filelock", "jinja2", "lightning", "matplotlib", "PIL", "pycocotools", "rich", "sklearn", "tensorboard",
    "torchmetrics", "typer",
}  # fmt: skip
"""Import names of the packages that ``pip install 'ecanet[train]'`` brings."""

INSTALL = "pip install 'ecanet[train]'"  # quoted, because zsh takes bare brackets for a pattern

SHORT_HELP = f"""\
Usage: ecanet COMMAND [OPTIONS]

Channel attention for convolutional networks: train, evaluate, compare.

Commands:
  train, eval, predict, detect, report, weights, push,
  models, cost, paper, ablate, inspect, app, bench, export,
  slim, doctor, completion, shards

The commands need more packages: {INSTALL}
"""
"""The help that needs no package of the train extra."""


def main() -> NoReturn:
    """Run the command line and exit with one of the codes above."""
    output = None if sys.stdout is None else os.dup(1)  # rich puts the null device in the place of a closed pipe
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe can be said
        sys.exit(code)
    except EcanetError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
            raise
        _answer_without_packages(error.name or "", sys.argv[1:])
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _fail("torch and torchvision do not fit together; install both from one place (pip install torch torchvision)")
    except (BrokenPipeError, SystemExit) as error:
        # click and rich end with 1 and no word where nobody reads the output.
        broken = error if isinstance(error, BrokenPipeError) else error.__context__
        if not isinstance(broken, BrokenPipeError):
            raise
        if output is None or _has_reader(output):  # the pipe to another process has broken, which is a failure
            raise broken from None
        # Python itself writes what is left when it ends, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print("ecanet: standard output is closed; the rest of the output is lost", file=sys.stderr)
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if output is not None:
            os.close(output)


def _has_reader(output: int) -> bool:
    """Return whether somebody reads the pipe ``output``. A file has always a reader."""
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(output, 0)  # a closed pipe is reported in any case
    return not poll.poll(0)


def _run() -> int:
    """Run the command in ``sys.argv`` and return its exit code."""
    import typer

    from ecanet.cli import app

    # The base class is click's UsageError with an older typer, and typer's own copy of it with a newer one.
    usage_error = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
    try:
        return app(prog_name="ecanet", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except usage_error as error:
        message = " ".join(error.format_message().split())
        if not message:  # without arguments, typer has already shown the help
            return 0
        # An option without its value is reported without a context. Only commands have such options: the first word.
        command = error.ctx.command_path if error.ctx else f"ecanet {sys.argv[1]}"
        return _fail(f"{message.rstrip('.')} (see {command} --help)")


def _answer_without_packages(missing: str, arguments: list[str]) -> NoReturn:
    """Answer ``--version``, ``--help`` and ``doctor``, and fail on all else, without the package ``missing``."""
    from ecanet import __version__

    if arguments == ["--version"]:
        print(f"ecanet {__version__}")
        sys.exit(0)
    if arguments == ["doctor"]:
        from ecanet.studies.doctor import examine, find_exit_code, format_findings

        findings = examine()
        print(f"ecanet {__version__}\n\n{format_findings(findings)}")
        sys.exit(find_exit_code(findings))
    if not arguments or arguments in (["--help"], ["-h"]):
        print(SHORT_HELP, end="")
        sys.exit(0)
    _fail(f"{missing} is not installed; the command line needs more packages: {INSTALL}")


def _fail(message: str) -> NoReturn:
    """Print ``message`` as one line on standard error and exit with 2."""
    print(f"ecanet: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
