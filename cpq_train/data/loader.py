"""How samples are loaded in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from typing_extensions import override

from cpq_train.common.child_processes import follow_parent
from cpq_train.common.signals import signals_blocked
from cpq_train.data.bad_sweeps import BadSweepLimit

T_co = TypeVar("T_co", covariant=True)


class FollowingLoader(DataLoader[T_co]):
    """A DataLoader whose processes leave signals to this one, end with it, and compute in one thread.

    By itself torch lets SIGTERM, which SLURM sends to every process, end the workers, and the main process
    then fails before it can save.

    Args:
        *args: of DataLoader.
        limit: looks at every batch; None where clouds that cannot be used are errors.
        **kwargs: of DataLoader.
    """

    def __init__(self, *args: Any, limit: BadSweepLimit | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    @override
    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # theirs says of what class
        with signals_blocked():
            batches = super().__iter__()
        return batches if self.limit is None else self.limit.watch(batches)


def start_worker(_: int) -> None:
    """`worker_init_fn` of a `FollowingLoader`: workers share the cores, and torch minds its threads only."""
    follow_parent()
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no annotations

    threadpool_limits(1)
