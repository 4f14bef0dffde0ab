"""How many clouds may be left out, and which are: counted in the main process, for each rank's epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cpq_train.common.errors import UserError
from cpq_train.common.progress import say
from cpq_train.data.points.files import CloudError


def check_share(max_bad_sweeps: float) -> None:
    """See that a share may be left out.

    Raises:
        UserError: it is none, or all.
    """
    if not 0 <= max_bad_sweeps < 1:
        raise UserError(f"data.max_bad_sweeps is {max_bad_sweeps}: expected 0 to less than 1")


class BadSweepLimit:
    """Counts what a loader's batches lack, names it, and stops where it is too much.

    Args:
        max_share: of the sweeps of this rank's epoch.
        num_sweeps: of this rank's epoch.
        report: is told the count, 0 when an epoch begins.
    """

    def __init__(
        self, max_share: float, num_sweeps: int, report: Callable[[int], None] | None = None
    ) -> None:
        self._num_sweeps = num_sweeps
        self._most = int(max_share * num_sweeps + 1e-9)  # 0.29 of 100 is 28.999999999999996
        self._max_share, self._report = max_share, report

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an epoch, without what is said of bad sweeps.

        Raises:
            CloudError: more are bad than accepted.
        """
        count = 0
        self._tell(count)
        for batch in batches:
            notes = batch.pop("bad_sweeps", ())
            for note in notes:
                say(f"left out: {note}")
            if notes:
                count += len(notes)
                self._tell(count)
            yield batch

    def _tell(self, count: int) -> None:
        if self._report is not None:
            self._report(count)
        if count > self._most:
            raise CloudError(
                f"{count} of the {self._num_sweeps} sweeps cannot be used: data.max_bad_sweeps "
                f"{self._max_share:g} accepts {self._most}"
            )
