"""What to say where a process is gone that the present one works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpq_train.common.errors import UserError

_OF_A_WORKER = ("DataLoader worker (pid", "in the process pool was terminated")
"""What torch says of a loading process, and Python of a simulating one."""

_OF_A_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
"""What gloo and NCCL say."""


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the errors of torch about dead workers and ranks into what a person does about them.

    Raises:
        UserError: A process that loads or makes data died, or another rank of the run did.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if any(part in said for part in _OF_A_WORKER):
            raise UserError(f"a process that loads data died: {_first_line(said)}{_memory(said)}") from error
        if any(part in said for part in _OF_A_RANK):
            raise UserError(
                f"another rank of this run ended, and this one cannot go on alone ({_first_line(said)}): "
                "the reason stands in that rank's log; the same command with --ckpt_path last goes on"
            ) from error
        raise


def _memory(said: str) -> str:
    """What to try where the system may have killed a worker; torch does not always know the signal."""
    if "by signal" in said and not any(how in said for how in ("Killed", "Bus error")):
        return ""
    return (
        ". Often the memory of the machine or /dev/shm is full: lower data.num_workers or data.batch_size; "
        "a fit goes on from its last checkpoint with --ckpt_path last"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
