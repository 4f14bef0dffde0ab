"""What is used of W&B beyond its documented ways, under public names.

Not in `lightning_private`: there jsonargparse, after the types of options, would import wandb in every run.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb


def use_offline(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Say that an offline run reads an artifact.

    Offline `use_artifact` refuses. What it does with an artifact that is not logged yet works there too: the
    artifact goes along, and the sync of the run notes its use once W&B has it.
    """
    run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)


def end_connection() -> None:
    """Give up the connection to W&B's process, which is gone; at exit W&B would fail for lack of it."""
    import wandb

    with suppress(ConnectionError):
        wandb.teardown()
