"""Which rank loads which sample, in what order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from torch.utils.data import DistributedSampler

from cpq_train.data.cloud_files import CloudFiles
from cpq_train.data.dataset import DetectionDataset, SampleKey

# Both extend DistributedSampler so that Lightning leaves them in place and tells them the epoch.


class TrainingSampler(DistributedSampler[SampleKey]):
    """Every sample in an order that changes with the epoch, dealt to the ranks in turn.

    All ranks get equally many: a few samples come twice where the number does not divide. Each key carries
    the epoch, which is how workers that outlive an epoch learn of the next one.
    """

    _begun_epoch, _num_taken = -1, 0

    def begin_at(self, epoch: int, num_taken: int) -> None:
        """Begin in an epoch, behind those of this rank's samples that a resumed run was trained on before.

        Args:
            epoch: Which one; those after it are whole.
            num_taken: How many samples to leave out.
        """
        self.set_epoch(epoch)
        self._begun_epoch, self._num_taken = epoch, num_taken

    def __iter__(self) -> Iterator[SampleKey]:
        num_taken = self._num_taken if self.epoch == self._begun_epoch else 0
        for position in itertools.islice(super().__iter__(), num_taken, None):
            yield self.epoch, int(position)  # type: ignore[call-overload]


class EvaluationSampler(DistributedSampler[int]):
    """Every sample exactly once: rank r of n takes r, r + n, r + 2 n, ..., and ranks may differ by one.

    A rank that would get none takes one that another has, too: Lightning leaves a rank without a batch out of
    what the ranks do together. Whoever collects by sample counts it once.
    """

    def __init__(self, dataset: DetectionDataset | CloudFiles, rank: int, world_size: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self._first = rank % max(1, len(dataset))
        self.num_samples = math.ceil((len(dataset) - self._first) / world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._first, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def dealt_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's batches: whole batches are dealt in turn, so that any number of ranks forms the same ones.

    A rank gets none where there are fewer batches than ranks.
    """
    starts = range(0, num_samples, batch_size)[rank::world_size]
    return [list(range(start, min(start + batch_size, num_samples))) for start in starts]
