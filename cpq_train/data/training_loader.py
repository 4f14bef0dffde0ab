"""The loader of training samples, which can begin in the middle of an epoch."""

from __future__ import annotations

from typing import Any, Protocol

from torch.utils.data import DataLoader

from cpq_train.data.dataset import Item
from cpq_train.data.samplers import TrainingSampler
from cpq_train.errors import UserError


class _Counts(Protocol):
    processed: int


class Progress(Protocol):
    """Lightning's count of the batches of an epoch, as far as it is needed here."""

    is_last_batch: bool

    @property
    def current(self) -> _Counts:
        """Of the present epoch; `processed` is how many were trained on."""


class TrainingLoader(DataLoader[Item]):
    """Batches of a `TrainingSampler`; says how far the ranks have come, and goes on from there.

    Lightning keeps what `state_dict` gives in every checkpoint, and gives it back before it asks for the
    first batch. All draws depend on seed, epoch and position alone, so the place in the epoch is all there
    is to know, and what was trained on is not loaded again. The order of an epoch is dealt to the ranks in
    turn: as long as ranks x batch size stays, any number of ranks goes on with the very same batches.

    Attributes:
        progress: What Lightning has counted; None outside a fit.
    """

    progress: Progress | None = None

    def state_dict(self) -> dict[str, Any]:
        """Which samples of which epoch were trained on."""
        assert self.progress is not None
        return {
            **self._order(),
            "epoch": self._sampler.epoch,
            "num_batches": self.progress.current.processed,
            "samples_per_batch": self._samples_per_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked for.

        Raises:
            UserError: The samples, their order or their division into batches are not what they were.
        """
        num_batches, samples_per_batch = state["num_batches"], state["samples_per_batch"]
        wanted = {**self._order(), "samples_per_batch": self._samples_per_batch}
        differing = [key for key, value in wanted.items() if state[key] != value]
        if differing and 0 < num_batches < state["num_samples"] / samples_per_batch:
            told = ", ".join(f"{key} was {state[key]} and is {wanted[key]}" for key in differing)
            raise UserError(
                f"the checkpoint lies in the middle of epoch {state['epoch']}, which cannot go on: {told}; "
                "accepted: the same samples and data.seed, and as many ranks x data.batch_size as before"
            )
        assert self.batch_size is not None
        self._sampler.skip(state["epoch"], num_batches * self.batch_size)

    @property
    def _sampler(self) -> TrainingSampler:
        assert isinstance(self.sampler, TrainingSampler)
        return self.sampler

    @property
    def _samples_per_batch(self) -> int:
        """Over all ranks."""
        assert self.batch_size is not None
        return self._sampler.num_replicas * self.batch_size

    def _order(self) -> dict[str, int]:
        return {"seed": self._sampler.seed, "num_samples": len(self._sampler.dataset)}  # type: ignore[arg-type]
