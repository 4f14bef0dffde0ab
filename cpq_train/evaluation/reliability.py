"""Whether a confidence means what it says: precision by score, and the expected calibration error.

The bins and the error are those of Guo et al., "On Calibration of Modern Neural Networks", 2017
(https://arxiv.org/abs/1706.04599), over detections instead of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpq_train.evaluation.boxes import Floats, Ints
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.protocol import TP_THRESHOLD_INDEX

NUM_BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Detections in `NUM_BINS` equally wide bins of score; the last one holds score 1 too.

    Attributes:
        count: (bins,) detections.
        confidence: (bins,) their mean score, NaN where there is none.
        precision: (bins,) share of them that match an annotation of their class within 2 m, NaN likewise.
    """

    count: Ints
    confidence: Floats
    precision: Floats

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the sum over bins of count / all times |precision - confidence|.

        0 where every score is the chance of a match, NaN without detections. Detectors keep many boxes of
        low score, whose bin weighs most; the bins say where the error comes from.
        """
        if not self.count.any():
            return float("nan")
        weight = self.count / self.count.sum()
        return float(np.nansum(weight * np.abs(self.precision - self.confidence)))

    def to_document(self) -> dict[str, Any]:
        """Plain values for a JSON file; NaN becomes null."""
        columns = {"confidence": self.confidence, "precision": self.precision}
        listed = {name: [_plain(value) for value in column] for name, column in columns.items()}
        return {"count": self.count.tolist(), **listed, "expected_error": _plain(self.expected_error)}


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def scores_are_chances(matches: Matches | None) -> bool:
    """Whether all scores lie between 0 and 1: those of other detectors may be logits."""
    return matches is not None and bool(((matches.pred_score >= 0) & (matches.pred_score <= 1)).all())


def reliability(matches: Matches) -> Reliability:
    """Reliability of the detections that count, all classes together; see `scores_are_chances`."""
    score, is_hit = matches.pred_score, matches.is_match[TP_THRESHOLD_INDEX]
    bins = np.minimum((score * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    sums = (np.bincount(bins, values, NUM_BINS) for values in (score, is_hit.astype(float)))
    empty = np.full(NUM_BINS, np.nan)
    confidence, precision = (np.divide(of, count, out=empty.copy(), where=count > 0) for of in sums)
    return Reliability(count, confidence, precision)
