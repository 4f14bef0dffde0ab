"""Pictures from above: points, ground truth and detections of arms, in colours that everybody tells apart.

Colours: Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/). Ground truth is filled
and detections are outlines, a lost object has a solid ring and a won one a dashed ring, so that the picture
also reads in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.picture import picture
from cpq_train.common.text import visible
from cpq_train.report.bev import BevSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUND_TRUTH_COLOUR = "#56B4E9"
DETECTION_COLOUR = "#D55E00"
LOST_COLOUR = "#000000"
WON_COLOUR = "#009E73"
MIN_SCORE = 0.3

_PANEL_INCHES = 8.0
_FEW = 4
"""So many panels stand two in a row, more of them four: a page is wider than it is high."""
_MARGIN_M = 2.0
"""How far a picture reaches beyond the largest class range."""
_RING_STEPS_M = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
_MAX_RINGS = 6
_NOSE_M = 0.8
"""How far the heading line reaches over a box's front, so that it shows on a pedestrian too."""
_MARK_M = 1.6
"""How far the ring of a lost or won object stands off its box."""

BoxArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class BevPanel:
    """What a panel shows of a sample.

    Attributes:
        sample: points, ground truth and detections.
        min_score: detections below are left out; one number, or one for each class (C,).
        lost: (G,) objects that float finds and this arm does not; None marks none.
        won: (G,) likewise the other way round.
    """

    sample: BevSample
    min_score: float | NDArray[np.floating[Any]] = MIN_SCORE
    lost: NDArray[np.bool_] | None = None
    won: NDArray[np.bool_] | None = None

    @property
    def is_shown(self) -> NDArray[np.bool_]:
        """(N,) detections of at least the score."""
        needed = np.asarray(self.min_score)
        shown: NDArray[np.bool_] = self.sample.scores >= (
            needed[self.sample.labels] if needed.ndim else needed
        )
        return shown


def draw_bev(path: Path, panels: Mapping[str, BevPanel], task: DetectionTask = NUSCENES) -> None:
    """Draw one sample from above, a panel of 800 x 800 pixels for each arm, two or four in a row.

    The vehicle stands in the middle and looks up; a line from a box's centre over its front is the heading.

    Args:
        path: the PNG to write.
        panels: title to what it shows.
        task: the classes; the largest of their ranges is inside the picture.
    """
    extent_m = float(task.ranges_m.max()) + _MARGIN_M
    columns = min(2 if len(panels) <= _FEW else 4, len(panels))
    rows = -(-len(panels) // columns)
    with picture(path, _PANEL_INCHES * columns, _PANEL_INCHES * rows) as figure:
        all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, panel) in zip(all_axes, panels.items(), strict=False):
            draw_panel(axes, panel, extent_m)
            axes.set_title(visible(title, "\n"), fontsize=19)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        handles: dict[str, Any] = {}
        for axes in all_axes:
            handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=3 * columns,
            fontsize=16 if columns > 1 else 13,
            frameon=False,
        )


def draw_panel(
    axes: Axes, panel: BevPanel, extent_m: float, centre_m: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Draw a square of a sample.

    Args:
        axes: where to.
        panel: what it shows.
        extent_m: half the side of the square.
        centre_m: its middle, x and y in the LiDAR frame.
    """
    sample = panel.sample
    points = np.asarray(sample.points, np.float32)
    axes.scatter(points[:, 0], points[:, 1], s=1.2, c="#9A9A9A", linewidths=0, rasterized=True)
    if centre_m == (0.0, 0.0):
        _draw_rings(axes, extent_m)
    _draw_boxes(axes, sample.gt_boxes, GROUND_TRUTH_COLOUR, "annotated object", filled=True)
    _draw_boxes(axes, sample.boxes[panel.is_shown], DETECTION_COLOUR, _detections(panel), filled=False)
    _draw_marks(axes, sample.gt_boxes, panel.lost, LOST_COLOUR, "solid", "lost: float finds it")
    _draw_marks(axes, sample.gt_boxes, panel.won, WON_COLOUR, (0, (2, 1)), "won: float misses it")
    axes.plot(0, 0, marker="^", markersize=12, color="black", linestyle="none", label="ego vehicle")
    x_m, y_m = ((middle - extent_m, middle + extent_m) for middle in centre_m)
    axes.set(xlim=x_m, ylim=y_m, aspect="equal", xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_color("#B0B0B0")


def _detections(panel: BevPanel) -> str:
    one = np.ndim(panel.min_score) == 0
    return f"detection, score ≥ {float(panel.min_score):g}" if one else "detection"


def _draw_rings(axes: Axes, extent_m: float) -> None:
    from matplotlib.patches import Circle

    for radius_m in _ring_radii(extent_m):
        axes.add_patch(Circle((0, 0), radius_m, fill=False, color="#B0B0B0", linewidth=1.0, linestyle=":"))
        side = radius_m / np.sqrt(2)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8}
        axes.text(
            side,
            -side,
            f"{radius_m:g} m",
            ha="center",
            va="center",
            fontsize=13,
            color="#505050",
            bbox=box,
        )


def _ring_radii(extent_m: float) -> list[float]:
    """Radii below an extent, of the smallest step that gives few."""
    step_m = next(step_m for step_m in _RING_STEPS_M if extent_m <= step_m * (_MAX_RINGS + 1))
    return [step_m * number for number in range(1, math.ceil(extent_m / step_m))]


def _draw_boxes(axes: Axes, boxes_N9: BoxArray, colour: str, label: str, filled: bool) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    if not len(boxes_N9):
        return
    corners, noses = _outlines(np.asarray(boxes_N9, np.float64))
    face = (colour, 0.55) if filled else "none"
    width = 1.2 if filled else 2.2
    axes.add_collection(
        PolyCollection(list(corners), facecolors=[face], edgecolors=colour, linewidths=width, label=label)
    )
    axes.add_collection(LineCollection(list(noses), colors=colour, linewidths=width))


def _draw_marks(
    axes: Axes, boxes_G9: BoxArray, rows: NDArray[np.bool_] | None, colour: str, line: Any, label: str
) -> None:
    from matplotlib.patches import Circle

    if rows is None:
        return
    axes.plot([], [], "o", markersize=15, fillstyle="none", color=colour, markeredgewidth=2.5, label=label)
    for box in np.asarray(boxes_G9, np.float64)[rows]:
        radius_m = np.hypot(box[3], box[4]) / 2 + _MARK_M
        axes.add_patch(
            Circle((box[0], box[1]), radius_m, fill=False, color=colour, linewidth=2.5, linestyle=line)
        )


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
