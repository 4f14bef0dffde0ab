"""How far an epoch's samples have been trained on."""

from __future__ import annotations

from dataclasses import dataclass

from cpq_train.common.errors import UserError


@dataclass(frozen=True)
class EpochPosition:
    """A place in an epoch.

    All draws of the training data depend on seed, epoch and position alone, so this is all there is to know.
    The order of an epoch is dealt to the ranks in turn: as long as ranks x batch size stays, any number of
    ranks goes on with the very same batches.

    Attributes:
        epoch: Which epoch.
        num_batches: How many of its batches every rank has trained on.
        samples_per_batch: Ranks x batch size.
        num_samples: Of the whole epoch.
        seed: Of its order.
    """

    epoch: int
    num_batches: int
    samples_per_batch: int
    num_samples: int
    seed: int

    def check_order(self, samples_per_batch: int, num_samples: int, seed: int) -> None:
        """Refuse to go on from the middle of an epoch that would now be another one.

        Raises:
            UserError: The samples, their order or their division into batches are not what they were.
        """
        present = {"samples_per_batch": samples_per_batch, "num_samples": num_samples, "seed": seed}
        differing = [key for key, value in present.items() if getattr(self, key) != value]
        if differing and 0 < self.num_batches * self.samples_per_batch < self.num_samples:
            told = ", ".join(f"{key} was {getattr(self, key)} and is {present[key]}" for key in differing)
            raise UserError(
                f"the checkpoint lies in the middle of epoch {self.epoch}, which cannot go on: {told}; "
                "accepted: the same samples and data.seed, and as many ranks x data.batch_size as before"
            )
