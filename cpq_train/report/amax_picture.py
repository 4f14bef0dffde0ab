"""The ranges of a run as a heat map of quantizers and steps.

Colours: blue and vermillion of Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/),
with white between them where a range is as at the start.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cpq_train.report.amax_history import History

NARROWER_COLOUR, UNCHANGED_COLOUR, WIDER_COLOUR = "#0072B2", "#F7F7F7", "#D55E00"
UNKNOWN_COLOUR = "#9A9A9A"
LEAST_LIMIT = 0.01
"""Of the colour scale: what moved by less than 0.7 % looks unchanged."""

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    names = [name for name, of_name in history.items() if any(r.drift is not None for r in of_name.values())]
    if not names:
        return
    steps = sorted({step for name in names for step in history[name]})
    drifts = np.array([[_drift(history, name, step) for step in steps] for name in names])
    limit = max(float(np.nanmax(np.abs(drifts))), LEAST_LIMIT)
    scale = LinearSegmentedColormap.from_list("drift", [NARROWER_COLOUR, UNCHANGED_COLOUR, WIDER_COLOUR])
    colours = scale.with_extremes(bad=UNKNOWN_COLOUR)
    figure = Figure(figsize=(14, 2 + _ROW_INCHES * len(names)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    cells = axes.imshow(drifts, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    shown = range(0, len(steps), math.ceil(len(steps) / _MAX_STEPS))
    axes.set_xticks(shown, [str(steps[column]) for column in shown], fontsize=12)
    axes.set_xlabel("step", fontsize=13)
    axes.set_title(f"Ranges of {len(names)} quantizers", fontsize=16)
    bar = figure.colorbar(cells, pad=0.02, shrink=0.3, aspect=30, anchor=(0.0, 1.0))
    bar.set_label("log2(amax / start): 1 is twice as wide, -1 half", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _drift(history: History, name: str, step: int) -> float:
    reading = history[name].get(step)
    return math.nan if reading is None or reading.drift is None else reading.drift
