"""A trained network on the Hugging Face Hub, or in a folder from there."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ecanet import networks
from ecanet.deploy.model_card import Measured
from ecanet.deploy.saving import FILES, INSTALL, save_pretrained
from ecanet.errors import CheckpointError, ConfigError, is_path, show_value, summarize
from ecanet.models import quiet_loggers
from ecanet.networks import CONFIG, WEIGHTS, Preprocessing
from ecanet.recipes import ModelConfig

__all__ = ["check_repository", "from_pretrained", "push_to_hub"]

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def from_pretrained(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> nn.Module:
    """Return the network that `save_pretrained` has written, with its weights and gates, in evaluation mode.

    ``model.pretrained_config`` has its class names, its preprocessing and the rest of ``config.json``. No code comes
    from the folder, and weights are loaded completely or not at all.

    Args:
        source: a folder, or a repository on the Hugging Face Hub ("owner/name"), of which two files are downloaded.
        revision: branch, tag or commit of the repository; None is its main branch.
        token: of the hub. None takes the one that ``hf auth login`` has stored or ``HF_TOKEN`` holds.

    Raises:
        CheckpointError: there is no such folder or repository, it cannot be reached, or its content is missing, broken
            or unsafe.
    """
    if not is_path(source):
        raise ConfigError(f"source must be a folder or the name of a repository, got {show_value(source)}")
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source), revision, token)
    elif revision is not None:
        raise ConfigError(f"{source} is a folder, and revision={revision!r} is for a repository; leave it out")
    model, config = networks.load_pretrained(folder)
    vars(model)["pretrained_config"] = config
    return model


def push_to_hub(
    model: nn.Module | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    network: str | ModelConfig | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    recipe: Mapping[str, object] | None = None,
    measured: Measured | None = None,
) -> str:
    """Upload ``model`` to the repository ``repo`` ("owner/name") on the Hugging Face Hub; return the commit's address.

    Args:
        model: a network, which is saved first, or a folder that `save_pretrained` has written.
        repo: is made if it does not exist.
        private: whether a new repository is private; None is what its owner has chosen.
        revision: the branch; None is the main branch.
        token: of the hub. None takes the one that ``hf auth login`` has stored or ``HF_TOKEN`` holds.
        network: as for `save_pretrained`, as are the next four; all are for a network alone.
        class_names: in the order of the logits.
        preprocessing: of the images.
        recipe: the settings of the run that trained it.
        measured: the figures of the model card.

    Raises:
        ConfigError: the network cannot be saved, the repository cannot be made or written, or ``repo`` is not
            OWNER/NAME.
        CheckpointError: the folder is missing or broken.
    """
    check_repository(repo)
    settings: dict[str, Any] = {
        "network": network,
        "class_names": class_names,
        "preprocessing": preprocessing,
        "recipe": recipe,
        "measured": measured,
    }
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "network")
            save_pretrained(model, folder, **settings)
            return _upload(folder, repo, private, revision, token)
    if given := [name for name, value in settings.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: {model} is saved already; save the network again with these")
    networks.load_pretrained(model)  # nobody could use a broken one
    return _upload(Path(model), repo, private, revision, token)


def check_repository(repo: str) -> None:
    """Check that ``repo`` has the form of a repository's name, before anything is computed or sent.

    Raises:
        ConfigError: it does not.
    """
    if not REPOSITORY.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository: give OWNER/NAME, such as ada/resnet50-eca")


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    """Return the folder with the two files of ``repo`` in the hub's cache, which are downloaded if they are new."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{repo}: no such folder; for a repository, huggingface_hub is missing: {INSTALL}"
        ) from error
    download = cast(Callable[..., str], huggingface_hub.snapshot_download)  # pyright: ignore[reportUnknownMemberType]
    try:
        with quiet_loggers("huggingface_hub"):
            return Path(download(repo, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the client's errors have changed their classes from version to version
        raise CheckpointError(f"{repo}: {_explain(error)}") from error


def _upload(folder: Path, repo: str, private: bool | None, revision: str | None, token: str | bool | None) -> str:
    """Upload the files of ``folder`` in one commit; return its address."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(f"huggingface_hub is missing; {INSTALL}") from error
    api = HfApi(token=token)
    try:
        with quiet_loggers("huggingface_hub"):
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message="Upload a network of ecanet",
                allow_patterns=list(FILES),
            )
    except Exception as error:  # as above
        raise ConfigError(f"{repo}: not uploaded: {_explain(error)}") from error
    return str(commit.commit_url)


def _explain(error: Exception) -> str:
    """Return what is wrong with a repository and what to do, by the hub's answer."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    login = "log in (hf auth login) or set HF_TOKEN"
    if kind in ("HFValidationError", "HfUriError"):
        return "no such folder, and not the name of a repository (owner/name)"
    if kind == "RevisionNotFoundError":
        return "the repository has no such revision; leave revision out, or name a branch, tag or commit"
    if kind == "GatedRepoError":
        return f"its owner must give you access; ask for it on the repository's page, then {login}"
    if kind == "RepositoryNotFoundError" or status == 404:
        return f"no such folder, and {constants.ENDPOINT} has no such repository, or it is private; {login}"
    if kind == "LocalTokenNotFoundError" or status == 401:
        return f"{constants.ENDPOINT} wants to know who you are; {login}"
    if status == 403:
        return f"the token may not do this at {constants.ENDPOINT}; use one that may write there"
    if status is not None:
        return f"{constants.ENDPOINT} answers {status}: {summarize(error)}"
    return f"{constants.ENDPOINT} cannot be reached ({summarize(error)}); try again when there is a connection"
