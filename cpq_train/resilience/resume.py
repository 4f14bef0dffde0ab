"""Which checkpoint of a run folder `--ckpt_path last` means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import TypeAdapter
from typing_extensions import NotRequired

from cpq_train.arms.description import Description
from cpq_train.arms.state import check_finite
from cpq_train.common.checkpoint import network_state, read_checkpoint, read_plain
from cpq_train.common.errors import UserError
from cpq_train.common.schema import Count, Number, keys, validated

RESUME_FILE = "resume.ckpt"
"""Where training stood last."""

PREVIOUS_FILE = "resume-previous.ckpt"
"""Its predecessor, in case a disk breaks the newest."""

RESUME_KEY = "resume"
"""The entry of a checkpoint that says where in its run it was written."""

_UNSAID: Final = {"run_number": 0, "run_started_s": 0.0, "ordinal": 0, "moment": "other"}

_ENTRY = {
    "run_number": NotRequired[Count],
    "run_started_s": Number,
    "ordinal": Count,
    "moment": str,
    "random_states": list[Any],
}
_SAID: TypeAdapter[Any] = TypeAdapter(
    keys({"epoch": Count, "global_step": Count, RESUME_KEY: NotRequired[keys(_ENTRY)]})
)
"""What places a checkpoint in its run."""


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(trainer.default_root_dir) / "checkpoints"


Place = tuple[int, float, int, bool, int]


def newest_checkpoint(folder: Path, unscored_epoch: int | None = None) -> Path | None:
    """The most advanced checkpoint of a run that can be resumed from, None where there is none.

    A start that is not a resume begins a run of its own, with the next number, so that an older run's files
    in the folder never count as more advanced, whatever the clocks say. A file that is torn, unreadable or
    damaged is passed over with a warning that names it.

    Args:
        folder: The run's `checkpoints` folder.
        unscored_epoch: The last epoch where its scores are still to be written: of its checkpoints the one
            from before the validation counts most.
    """
    places = {file: _place(said, unscored_epoch) for file, said in _resumable(folder).items()}
    for file in sorted(places, key=lambda file: places[file], reverse=True):
        try:
            _check_whole(file)
        except UserError as error:
            rank_zero_warn(f"{error}; taking the one before")
        else:
            return file
    return None


def next_run_number(folder: Path) -> int:
    """The number of a run that begins afresh in a folder: one more than those of the files there."""
    return 1 + max((_entry(said)["run_number"] for said in _resumable(folder).values()), default=0)


def _resumable(folder: Path) -> dict[Path, dict[str, Any]]:
    """The files that hold a state of training, and what they say; what cannot be read is passed over."""
    found = {}
    for file in sorted(folder.glob("*.ckpt")):
        try:
            checkpoint = read_plain(file, mmap=True)
            if isinstance(checkpoint, dict) and {"optimizer_states", "loops"} <= checkpoint.keys():
                validated(_SAID, checkpoint, f"checkpoint {str(file)!r}")
                found[file] = checkpoint
        except UserError as error:
            rank_zero_warn(f"{error}; passing over it")
    return found


def _entry(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Where in its run a checkpoint was written; files that do not say come before all others."""
    return {**_UNSAID, **checkpoint.get(RESUME_KEY, {})}


def _place(checkpoint: Mapping[str, Any], unscored_epoch: int | None) -> Place:
    """The file's run and how far it had come. Runs without a number are told apart by when they began."""
    entry = _entry(checkpoint)
    validates = entry["moment"] == "before_validation" or checkpoint["epoch"] != unscored_epoch
    number = entry["run_number"]
    began_s = 0.0 if number else entry["run_started_s"]
    return number, began_s, checkpoint["global_step"], validates, entry["ordinal"]


def _check_whole(file: Path) -> None:
    """Look at every number of a checkpoint before a run goes on from it.

    Raises:
        UserError: It is damaged, or holds numbers that no training goes on from.
    """
    checkpoint = read_checkpoint(file)
    Description.of(checkpoint, file)
    check_finite(network_state(checkpoint), f"checkpoint {str(file)!r}")
