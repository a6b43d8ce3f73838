"""How a run writes its checkpoint files, and finds them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ecanet.models import read_file

__all__ = ["AtomicCheckpointIO", "RunCheckpoint"]


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint callback that finds its files after the run's folder has moved.

    Lightning's own one would forget which checkpoint was the best.
    """

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore the state, with every path changed to the present folder."""
        folder = Path(str(self.dirpath))
        paths = {
            key: str(folder / Path(str(old)).name) for key, old in state_dict.items() if key.endswith("_path") and old
        }
        best = cast(dict[str, object], state_dict.get("best_k_models", {}))
        scores = {str(folder / Path(old).name): score for old, score in best.items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint completely or not at all, and read it without running code from it."""

    def save_checkpoint(
        self, checkpoint: Mapping[str, object], path: str | Path, storage_options: object = None
    ) -> None:
        """Write a temporary file, and rename it: a process that is killed leaves the old checkpoint."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        torch.save(checkpoint, temporary)
        temporary.replace(path)

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, object]:
        """Return the content of the checkpoint.

        Raises:
            CheckpointError: the file is missing, truncated, not a checkpoint, or would run code.
        """
        return cast(dict[str, object], read_file(path))
