"""Pictures from above: points, ground truth and detections of arms, in colours that everybody tells apart.

Colours: Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/). Ground truth is filled
and detections are outlines, so that the picture also reads in grey.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.evaluation.bev import BevSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUND_TRUTH_COLOUR = "#56B4E9"
DETECTION_COLOUR = "#D55E00"
EXTENT_M = 52.0
MIN_SCORE = 0.3

_PANEL_INCHES = 8.0
_DPI = 100
_RINGS_M = (20.0, 30.0, 40.0, 50.0)
_NOSE_M = 0.8
"""How far the heading line reaches over a box's front, so that it shows on a pedestrian too."""

Boxes = NDArray[np.floating[Any]]


def draw_bev(
    path: Path, samples: Mapping[str, BevSample], min_score: float = MIN_SCORE, extent_m: float = EXTENT_M
) -> None:
    """Draw one sample from above, one panel of 800 x 800 pixels for each arm.

    The vehicle stands in the middle and looks up; a line from a box's centre over its front is the heading.

    Args:
        path: the PNG to write.
        samples: title of each panel to what it shows.
        min_score: detections below are left out.
        extent_m: half the side of the square that is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL_INCHES * len(samples), _PANEL_INCHES), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(samples), squeeze=False)[0]
    for axes, (title, sample) in zip(panels, samples.items(), strict=True):
        _draw_panel(axes, sample, min_score, extent_m)
        num_shown = int((sample.scores >= min_score).sum())
        axes.set_title(f"{title}: {num_shown} detections, {len(sample.gt_boxes)} objects", fontsize=16)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=14, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axes: Axes, sample: BevSample, min_score: float, extent_m: float) -> None:
    points = np.asarray(sample.points, np.float32)
    shown = sample.scores >= min_score
    axes.scatter(points[:, 0], points[:, 1], s=1.0, c="#808080", linewidths=0, rasterized=True)
    _draw_rings(axes, extent_m)
    _draw_boxes(axes, sample.gt_boxes, GROUND_TRUTH_COLOUR, "ground truth", filled=True)
    label = f"detection, score ≥ {min_score:g}"
    _draw_boxes(axes, sample.boxes[shown], DETECTION_COLOUR, label, filled=False)
    axes.plot(0, 0, marker="^", markersize=10, color="black", linestyle="none", label="ego vehicle")
    axes.set(xlim=(-extent_m, extent_m), ylim=(-extent_m, extent_m), aspect="equal")
    axes.set_xlabel("right of the vehicle (m)", fontsize=13)
    axes.set_ylabel("ahead of the vehicle (m)", fontsize=13)
    axes.tick_params(labelsize=12)


def _draw_rings(axes: Axes, extent_m: float) -> None:
    from matplotlib.patches import Circle

    for radius_m in _RINGS_M:
        if radius_m < extent_m:
            axes.add_patch(
                Circle((0, 0), radius_m, fill=False, color="#B0B0B0", linewidth=0.8, linestyle=":")
            )


def _draw_boxes(axes: Axes, boxes_N9: Boxes, colour: str, label: str, filled: bool) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    corners, noses = _outlines(np.asarray(boxes_N9, np.float64))
    face = (colour, 0.55) if filled else "none"
    width = 1.2 if filled else 1.8
    axes.add_collection(
        PolyCollection(list(corners), facecolors=[face], edgecolors=colour, linewidths=width, label=label)
    )
    axes.add_collection(LineCollection(list(noses), colors=colour, linewidths=width))


def _outlines(boxes_N9: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, 4, 2) corners and (N, 2, 2) heading lines in the x-y plane."""
    cosine, sine = np.cos(boxes_N9[:, 6]), np.sin(boxes_N9[:, 6])
    forward, left = np.stack([cosine, sine], 1), np.stack([-sine, cosine], 1)
    half_length, half_width = boxes_N9[:, 3:4] / 2, boxes_N9[:, 4:5] / 2
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    offsets = [along * half_length * forward + across * half_width * left for along, across in signs]
    centre = boxes_N9[:, :2]
    nose = centre + (half_length + _NOSE_M) * forward
    return centre[:, None] + np.stack(offsets, axis=1), np.stack([centre, nose], axis=1)
