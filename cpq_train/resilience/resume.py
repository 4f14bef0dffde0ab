"""Which checkpoint of a run folder `--ckpt_path last` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cpq_train.common.checkpoint import check_intact, read_plain
from cpq_train.common.errors import UserError

RESUME_FILE = "resume.ckpt"
"""Where training stood last."""

PREVIOUS_FILE = "resume-previous.ckpt"
"""Its predecessor, in case a disk breaks the newest."""

RESUME_KEY = "resume"
"""The entry of a checkpoint that says where in its run it was written."""


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(trainer.default_root_dir) / "checkpoints"


Place = tuple[float, int, bool, int]


def newest_checkpoint(folder: Path, unscored_epoch: int | None = None) -> Path | None:
    """The most advanced checkpoint of a run that can be resumed from, None where there is none.

    A start that is not a resume begins a run of its own, so that an older run's files in the folder never
    count as more advanced. A file that is torn or unreadable is passed over with a warning that names it.

    Args:
        folder: The run's `checkpoints` folder.
        unscored_epoch: The last epoch where its scores are still to be written: of its checkpoints the one
            from before the validation counts most.
    """
    found = {file: _place(file, unscored_epoch) for file in folder.glob("*.ckpt")}
    places = {file: place for file, place in found.items() if place is not None}
    for file in sorted(places, key=lambda file: places[file], reverse=True):
        try:
            check_intact(file)
        except UserError as error:
            rank_zero_warn(f"{error}; taking the one before")
        else:
            return file
    return None


def _place(file: Path, unscored_epoch: int | None) -> Place | None:
    """Start of the file's run and how far it had come; None for a file that nothing resumes from."""
    try:
        checkpoint: dict[str, Any] = read_plain(file, mmap=True)
    except UserError as error:
        rank_zero_warn(f"{error}; passing over it")
        return None
    if not isinstance(checkpoint, dict) or not {"optimizer_states", "loops"} <= checkpoint.keys():
        return None
    entry = checkpoint.get(RESUME_KEY, {"run_started_s": 0.0, "ordinal": 0, "moment": "other"})
    validates = entry["moment"] == "before_validation" or checkpoint["epoch"] != unscored_epoch
    return entry["run_started_s"], checkpoint["global_step"], validates, entry["ordinal"]
