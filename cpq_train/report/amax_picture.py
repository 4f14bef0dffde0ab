"""The ranges of a run as a heat map of quantizers and steps.

Colours: blue and vermillion of Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/),
with white between them where a range is as at the start.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.common.picture import picture
from cpq_train.common.text import visible
from cpq_train.report.amax_history import History, drift_map

NARROWER_COLOUR, UNCHANGED_COLOUR, WIDER_COLOUR = "#0072B2", "#F7F7F7", "#D55E00"
UNKNOWN_COLOUR = "#9A9A9A"
_ROW_INCHES = 0.16
_MAX_STEPS = 12
"""Steps that are named below the map."""


def draw_amax_drift(path: Path, history: History) -> None:
    """Draw log2(amax / start_amax), a row per quantizer and a column per measured step.

    Quantizers without an amax are left out, and nothing is drawn where no quantizer has one.

    Args:
        path: the PNG to write.
        history: see `read_amax_history`.
    """
    from matplotlib.colors import LinearSegmentedColormap

    found = drift_map(history, list(history))
    if found is None:
        return
    names, steps, limit = found.names, found.steps, found.limit
    drifts = np.array(found.drifts, dtype=np.float64)  # None becomes NaN
    scale = LinearSegmentedColormap.from_list("drift", [NARROWER_COLOUR, UNCHANGED_COLOUR, WIDER_COLOUR])
    colours = scale.with_extremes(bad=UNKNOWN_COLOUR)
    how: dict[str, Any] = {"cmap": colours, "aspect": "auto", "interpolation": "nearest"}
    with picture(path, 14, 2 + _ROW_INCHES * len(names)) as figure:
        axes = figure.subplots()
        cells = axes.imshow(drifts, vmin=-limit, vmax=limit, **how)
        axes.set_yticks(range(len(names)), list(map(visible, names)), fontsize=8)
        shown = range(0, len(steps), math.ceil(len(steps) / _MAX_STEPS))
        axes.set_xticks(shown, [str(steps[column]) for column in shown], fontsize=12)
        axes.set_xlabel("step", fontsize=13)
        axes.set_title(f"Ranges of {len(names)} quantizers", fontsize=16)
        bar = figure.colorbar(cells, pad=0.02, shrink=0.3, aspect=30, anchor=(0.0, 1.0))
        bar.set_label("log2(amax / start): 1 is twice as wide, -1 half", fontsize=13)
