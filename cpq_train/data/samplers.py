"""Which rank loads which sample, in what order."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.utils.data import DistributedSampler

from cpq_train.data.dataset import DetectionDataset, SampleKey

# Both extend DistributedSampler so that Lightning leaves them in place and tells them the epoch.


class TrainingSampler(DistributedSampler[SampleKey]):
    """Every sample in an order that changes with the epoch, dealt to the ranks in turn.

    All ranks get equally many: a few samples come twice where the number does not divide. Each key carries
    the epoch, which is how workers that outlive an epoch learn of the next one.
    """

    def __iter__(self) -> Iterator[SampleKey]:
        for position in super().__iter__():
            yield self.epoch, int(position)  # type: ignore[call-overload]


class EvaluationSampler(DistributedSampler[int]):
    """Every sample exactly once: rank r of n takes r, r + n, r + 2 n, ..., and ranks may differ by one."""

    def __init__(self, dataset: DetectionDataset, rank: int, world_size: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.num_samples = max(0, math.ceil((len(dataset) - rank) / world_size))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
