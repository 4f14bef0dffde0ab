"""Whether timestamps are in microseconds: in other units velocities and time lags would be garbage."""

from __future__ import annotations

import numpy as np

from cpq_train.common.errors import UserError
from cpq_train.data.annotation_columns import Columns

_SHORTEST_US, _LONGEST_US = 5_000, 50_000_000
"""Between two samples of a scene. Units differ by a thousand, so that these tell them apart: nuScenes' 0.5 s,
and 0.1 s of other data sets, are not within them in ms or ns."""

_MOST_APART_US = 10_000_000
"""Between a sample and its LiDAR key frame."""

_UNITS_S = {"s": 1.0, "ms": 1e-3, "ns": 1e-9}


def check_times(columns: Columns) -> None:
    """See that the samples of scenes are as far apart as samples are, and at the times of their key frames.

    Args:
        columns: those of samples and frames.

    Raises:
        UserError: they are not.
    """
    times_us, scenes = columns["sample_times_us"], columns["sample_scenes"]
    order = np.lexsort((times_us, scenes))
    is_of_one_scene = np.diff(scenes[order]) == 0
    gaps_us = np.diff(times_us[order])[is_of_one_scene]
    if len(gaps_us):
        _check_gap(float(np.median(gaps_us)))
    apart_us = np.abs(columns["frame_times_us"][columns["sample_frames"]] - times_us)
    if len(apart_us) and apart_us.min() > _MOST_APART_US:
        raise UserError(
            f"table sample_data: LiDAR key frames are {apart_us.min() * 1e-6:g} s and more from the times "
            "of their samples; accepted: timestamps of both tables in microseconds"
        )


def _check_gap(gap_us: float) -> None:
    if _SHORTEST_US <= gap_us < _LONGEST_US:
        return
    fitting = [u for u, unit_s in _UNITS_S.items() if _SHORTEST_US <= gap_us * unit_s * 1e6 < _LONGEST_US]
    would = f"; in {fitting[0]} they would be {gap_us * _UNITS_S[fitting[0]]:g} s apart" if fitting else ""
    raise UserError(
        f"table sample: timestamps of neighbouring samples are {gap_us:g} apart (median){would}; accepted: "
        f"microseconds, {_SHORTEST_US:,} to {_LONGEST_US:,} apart"
    )
