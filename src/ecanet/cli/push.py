"""The command `ecanet push`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ecanet.cli.options import AsJson, check_folder, console, notices, print_json
from ecanet.errors import ConfigError


def push(
    run: Annotated[str, typer.Argument(help="Run directory, or a folder to upload again.", show_default=False)],
    repo: Annotated[str | None, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.", show_default=False)] = None,
    folder: Annotated[Path | None, typer.Option(help="Write the files here, too.", show_default=False)] = None,
    which: Annotated[str, typer.Option(help="best or last epoch.")] = "best",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.", show_default="main")] = None,
    as_json: AsJson = False,
) -> None:
    """Share a run's network, with a model card.

    Uploads it, or only writes --folder. `eval` and `predict` take such a folder as a run.
    """
    from ecanet.deploy import check_repository, push_to_hub
    from ecanet.networks import is_pretrained

    if repo is None and folder is None:
        raise ConfigError("give a repository (OWNER/NAME), or --folder to write the files only")
    if repo is not None:
        check_repository(repo)
    check_folder(folder)
    say = notices.print if as_json else console.print
    result: dict[str, object] = {}
    if is_pretrained(run):
        if repo is None or folder is not None:
            raise ConfigError(f"{run} is such a folder already; give a repository, and leave --folder out")
        result["commit"] = push_to_hub(run, repo, private=private or None, revision=revision)
        say(result["commit"])
    else:
        from ecanet.studies.publishing import publish

        with tempfile.TemporaryDirectory() as temporary:
            made = folder or Path(temporary, "network")
            about = publish(run, made, which=which)
            result |= {"network": about.network.name, "attention": about.network.attention}
            result |= {"gates": len(about.sites), "classes": len(about.class_names)}
            say(f"{result['network']} with {result['attention']}: {result['gates']} gates, {result['classes']} classes")
            if folder is not None:
                result["folder"] = str(folder)
                say(f"folder {folder}")
            if repo is not None:
                result["commit"] = push_to_hub(made, repo, private=private or None, revision=revision)
                say(result["commit"])
    if as_json:
        print_json(result)
