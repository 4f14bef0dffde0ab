"""How Lightning reads and writes checkpoints here: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from cpq_train.common.checkpoint import checked, read_plain, write_checkpoint
from cpq_train.common.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it put on the disk, and moves it there; reads no code."""

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See CheckpointIO; tensors and plain values on the CPU, whatever `weights_only`.

        Raises:
            UserError: The file is missing, damaged, or holds code.
        """
        content: dict[str, Any] = read_plain(path)
        # Lightning also passes bare weights from a forked process to its parent in this way.
        return checked(content, path) if "state_dict" in content else content

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """See CheckpointIO.

        Raises:
            UserError: The disk is full; names the newest checkpoint that stays.
        """
        try:
            write_checkpoint(checkpoint, path)
        except UserError as error:
            raise UserError(f"{error}; {_kept(Path(path).parent)}") from error


def _kept(folder: Path) -> str:
    written = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not written:
        return "there is no earlier checkpoint"
    return f"{str(written[-1])!r} stays: make room, and go on from it with --ckpt_path last"
