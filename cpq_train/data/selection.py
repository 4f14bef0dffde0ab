"""Which samples train, calibrate and evaluate: splits, and what of them counts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from cpq_train.common.errors import UserError
from cpq_train.common.progress import say
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.presence import scenes_without_files
from cpq_train.data.splits import UNION

Rows = NDArray[np.int64]

DEFAULT_TRAIN_SPLIT: Final = "train"

MissingScenes = Literal["error", "skip"]
"""What becomes of scenes of which clouds are missing."""


class SplitNames(NamedTuple):
    """Splits by what they are for; several joined by "+" are their union."""

    train: str
    val: str
    test: str
    calibration: str

    @classmethod
    def of(
        cls, train: str, several: Sequence[str] | None, val: str, test: str, calibration: str | None
    ) -> Self:
        """From the options of `NuScenesDataModule`.

        Raises:
            UserError: training has no split, or `train` is set beside several.
        """
        if several is None:
            return cls(train, val, test, calibration or train)
        if not several or train != DEFAULT_TRAIN_SPLIT:
            raise UserError(
                f"data.train_splits is {list(several)}, data.train_split {train!r}; accepted: one split or "
                "more, and no train_split beside them"
            )
        unscored = next((name for name in several if name != val), several[0])
        return cls(UNION.join(several), val, test, calibration or unscored)

    @classmethod
    def only(cls, split: str) -> Self:
        """One split for everything."""
        return cls(split, split, split, split)


class Limits(NamedTuple):
    """What of the splits is taken; `NuScenesDataModule` documents each."""

    sample_tokens: list[str] | None = None
    missing_scenes: MissingScenes = "error"
    force_calibration_on_val: bool = False
    force_score_on_train: bool = False


class Selection:
    """The samples of a data set by what they are for, as index rows.

    Args:
        index: the data set.
        names: of the splits.
        limits: what of them is taken.
        num_sweeps: of each sample, whose files have to be there.
        tell: prints how many scenes are left out.
    """

    def __init__(
        self,
        index: NuScenesIndex,
        names: SplitNames,
        limits: Limits,
        num_sweeps: int,
        tell: Callable[[str], object] = say,
    ) -> None:
        self._index, self._names, self._limits, self._num_sweeps = index, names, limits, num_sweeps
        self._tell = tell
        self._skipped: dict[str, list[str]] = {}

    @cached_property
    def train_rows(self) -> Rows:
        """Of the training split (S,), each once."""
        return self._of(self._names.train)

    @property
    def val_rows(self) -> Rows:
        """Of the validation split (S,), or of its `sample_tokens`."""
        return self._of(self._names.val, self._limits.sample_tokens)

    @cached_property
    def trained_and_scored(self) -> str | None:
        """The training split, where it holds samples of the validation split."""
        is_scored = self._index.is_in_split(self.train_rows, self._names.val)
        return self._names.train if is_scored.any() else None

    def check_unseen(self, trained_on: str | None, words: str) -> None:
        """See that a network is not scored on what it was trained on.

        Args:
            trained_on: the splits of its training, joined by "+"; None where nobody says.
            words: whose training, for the message.

        Raises:
            UserError: it is, and nobody forces the score.
        """
        if trained_on is None or self._limits.force_score_on_train:
            return
        rows = self.val_rows
        num_seen = int(self._index.is_in_split(rows, trained_on).sum())
        if num_seen:
            raise UserError(
                f"{words} {trained_on!r} holds {num_seen} of the {len(rows)} samples of data.val_split "
                f"{self._names.val!r}, whose scores would be too good; choose another split, set "
                "data.force_score_on_train to true, or, in a fit, trainer.limit_val_batches to 0"
            )

    @property
    def test_rows(self) -> Rows:
        """Of the test split (S,), or of its `sample_tokens`."""
        return self._of(self._names.test, self._limits.sample_tokens)

    @property
    def predict_rows(self) -> Rows:
        """Of the `sample_tokens` (S,), of whatever split; without any, of the test split."""
        tokens = self._limits.sample_tokens
        return self.test_rows if tokens is None else self._index.sample_rows(None, tokens)

    def calibration_rows(self, number: int, seed: int) -> Rows:
        """So many samples (N,) to calibrate with, each scene giving equally many, up to one.

        Raises:
            UserError: there are not so many, none are asked for, or one is a validation sample.
        """
        index, names = self._index, self._names
        rows = self._of(names.calibration)
        if not 1 <= number <= len(rows):
            raise UserError(
                f"data.num_calibration_samples is {number}: "
                f"expected 1 to {len(rows)}, the samples of split {names.calibration!r}"
            )
        chosen = stratified_choice(rows, index.sample_scenes[rows], number, seed)
        num_val = int(index.is_in_split(chosen, names.val).sum())
        if num_val and not self._limits.force_calibration_on_val:
            raise UserError(
                f"data.calibration_split {names.calibration!r}: {num_val} of the {len(chosen)} samples "
                f"belong to data.val_split {names.val!r}, whose scores would be too good; "
                "choose another split, or set data.force_calibration_on_val to true"
            )
        return chosen

    def skipped(self, split: str) -> list[str]:
        """Names of the scenes of a split that are left out, because files of theirs are missing."""
        self._of(split)
        return self._skipped.get(split, [])

    def _of(self, split: str, tokens: list[str] | None = None) -> Rows:
        rows = self._index.sample_rows(split, tokens)
        if self._limits.missing_scenes == "error":
            return rows
        rows_of_split = self._index.sample_rows(split)
        if split not in self._skipped:
            self._skipped[split] = self._missing(split, rows_of_split)
        skipped = np.array([name.encode() for name in self._skipped[split]], dtype=np.bytes_)
        return rows[~np.isin(self._index.scene_names[self._index.sample_scenes[rows]], skipped)]

    def _missing(self, split: str, rows: Rows) -> list[str]:
        """Names of the scenes of a split of which files are missing; said once.

        Raises:
            UserError: they are all of them.
        """
        missing = scenes_without_files(self._index, rows, self._num_sweeps)
        num_scenes = len(np.unique(self._index.sample_scenes[rows]))
        if len(missing) == num_scenes:
            raise UserError(
                f"data.missing_scenes is 'skip', and files of all {num_scenes} scenes of split {split!r} are "
                f"missing in {self._index.root}, such as {next(iter(missing.values()))}; "
                "accepted: a root that holds the sweeps of one scene or more"
            )
        if missing:
            name, file = next(iter(missing.items()))
            self._tell(
                f"split {split}: {len(missing)} of {num_scenes} scenes are skipped, for files of theirs are "
                f"missing, such as {file} of {name}"
            )
        return list(missing)


def stratified_choice(
    rows: NDArray[np.int64], strata: NDArray[np.int32], number: int, seed: int
) -> NDArray[np.int64]:
    """Draws samples evenly over strata.

    Every stratum gives equally many, up to one; the seed says which, and which strata give one more. A
    stratum that has too few gives all it has, and the others make up for it.

    Args:
        rows: (S,) what to draw from.
        strata: (S,) the stratum of each, such as its scene.
        number: how many to draw, at most S.
        seed: of the draw.

    Returns:
        (number,) some of `rows`, ascending.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    drawn: Counter[int] = Counter()
    rounds = []  # in which round each sample is drawn, one of every stratum in a round
    for stratum in strata[order].tolist():
        rounds.append(drawn[stratum])
        drawn[stratum] += 1
    return np.sort(rows[order[np.argsort(rounds, kind="stable")[:number]]])
