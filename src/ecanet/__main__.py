"""The console's entry point: what goes wrong is one line on standard error, and exit code 2."""

import sys
from typing import NoReturn

from ecanet.errors import EcanetError

__all__ = ["main"]

TRAIN_EXTRA = {
    "filelock", "jinja2", "lightning", "matplotlib", "PIL", "pycocotools", "rich", "sklearn", "tensorboard",
    "torchmetrics", "typer",
}  # fmt: skip


def main() -> NoReturn:
    """Run the command line and exit: 0 for success, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        sys.exit(_run())
    except EcanetError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
            raise
        _fail(f"{error.name} is not installed; the command line needs more packages: pip install ecanet[train]")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _fail("torch and torchvision do not fit together; install both from one place (pip install torch torchvision)")
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    import typer

    from ecanet.cli import app

    # typer carries click's errors in its own package in newer versions, and uses click's in older ones
    usage_error = typer.BadParameter.__bases__[0]
    try:
        return app(prog_name="ecanet", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except usage_error as error:  # pyright: ignore[reportGeneralTypeIssues]
        command = error.ctx.command_path if getattr(error, "ctx", None) else "ecanet"
        message = " ".join(error.format_message().split())
        if not message:  # no arguments: typer has shown the help
            return 0
        return _fail(f"{message.rstrip('.')} (see {command} --help)")


def _fail(message: str) -> NoReturn:
    print(f"ecanet: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
