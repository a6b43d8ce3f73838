"""`ecanet doctor`: what works on this machine, and what to install."""

from dataclasses import asdict

import typer

from ecanet import __version__
from ecanet.cli.options import AsJson, console, print_json
from ecanet.studies.doctor import examine, find_exit_code, format_findings


def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, and what to install."""
    findings = examine()
    if as_json:
        print_json({"ecanet": __version__, "findings": [asdict(found) for found in findings]})
    else:
        console.print(f"ecanet {__version__}\n\n{format_findings(findings)}")
    raise typer.Exit(find_exit_code(findings))
