"""Single objects from near by, as two arms see them: why one of them loses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cpq_train.common.picture import picture
from cpq_train.common.text import visible
from cpq_train.report.plots import BevPanel, draw_panel

MAX_OBJECTS = 4
CLOSE_UP_EXTENT_M = 9.0

_PANEL_INCHES = 4.0


class CloseUp(NamedTuple):
    """An object to look at.

    Attributes:
        row: its row in `gt_boxes` of the sample.
        title: what stands above it.
    """

    row: int
    title: str


def draw_close_ups(
    path: Path, close_ups: Sequence[CloseUp], above: tuple[str, BevPanel], below: tuple[str, BevPanel]
) -> None:
    """Draw objects in columns of 400 pixels, as one arm sees them above and as another does below.

    Args:
        path: the PNG to write.
        close_ups: the objects, one or more.
        above: name of an arm, and what it detects in the sample.
        below: likewise for the same sample.
    """
    with picture(path, _PANEL_INCHES * len(close_ups), _PANEL_INCHES * 2 + 0.4) as figure:
        grid = figure.subplots(2, len(close_ups), squeeze=False)
        for line, (name, panel) in zip(grid, (above, below), strict=True):
            line[0].set_ylabel(visible(name), fontsize=16)
            for axes, close_up in zip(line, close_ups, strict=True):
                box = panel.sample.gt_boxes[close_up.row]
                draw_panel(axes, panel, CLOSE_UP_EXTENT_M, (float(box[0]), float(box[1])))
        for axes, close_up in zip(grid[0], close_ups, strict=True):
            axes.set_title(close_up.title, fontsize=13)
