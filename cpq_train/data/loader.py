"""How samples are loaded in processes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch.utils.data import DataLoader
from typing_extensions import override

from cpq_train.common.child_processes import follow_parent
from cpq_train.common.signals import signals_blocked

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

T_co = TypeVar("T_co", covariant=True)


class FollowingLoader(DataLoader[T_co]):
    """A DataLoader whose processes leave signals to this one, end with it, and compute in one thread.

    By itself torch lets SIGTERM, which SLURM sends to every process, end the workers, and the main process
    then fails before it can save.
    """

    @override
    def __iter__(self) -> _BaseDataLoaderIter:
        with signals_blocked():
            return super().__iter__()


def start_worker(_: int) -> None:
    """`worker_init_fn` of a `FollowingLoader`: workers share the cores, and torch minds its threads only."""
    follow_parent()
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no annotations

    threadpool_limits(1)
