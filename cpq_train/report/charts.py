"""The charts of a report as SVG: intervals, curves in panels, grouped bars, a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpq_train.report.svg import Axes, Canvas, clipped, nice_ticks, style, width_of

WIDTH = 1100
_MUTED = "var(--muted, #57606a)"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A value with what its interval is, where there is one."""

    label: str
    value: float
    interval: tuple[float, float] | None


def intervals(panels: Mapping[str, Sequence[Estimate]]) -> str:
    """Values with their intervals, a row for each run and a panel for each metric, side by side."""
    labels = [clipped(estimate.label) for estimate in next(iter(panels.values()))]
    margin = 18 + max(map(width_of, labels))
    pane = (WIDTH - margin) / len(panels)
    canvas = Canvas(WIDTH, 56 + 26 * len(labels))
    for number, (title, estimates) in enumerate(panels.items()):
        ends = [end for e in estimates for end in (e.interval or (e.value, e.value))]
        ticks = nice_ticks(min(ends), max(ends))
        axes = Axes(
            margin + number * pane, 28, pane - 44, 26.0 * len(labels), (ticks[0], ticks[-1]), (len(labels), 0)
        )
        axes.draw(canvas, ticks, [], "")
        canvas.text(axes.left, 18, title, 13, font_weight="600")
        for row, estimate in enumerate(estimates):
            _draw_estimate(canvas, axes, row, estimate, style(row).colour)
    for row, label in enumerate(labels):
        canvas.text(margin - 10, 28 + 26 * (row + 0.5) + 4, label, 12, "end")
    return str(canvas)


def _draw_estimate(canvas: Canvas, axes: Axes, row: int, estimate: Estimate, colour: str) -> None:
    y = axes.y(row + 0.5)
    if estimate.interval is not None:
        canvas.line([(axes.x(end), y) for end in estimate.interval], colour, 3)
    canvas.dot(axes.x(estimate.value), y, colour, 6)


def curves(
    panels: Mapping[str, Mapping[str, Points]],
    x_label: str,
    y_label: str,
    columns: int = 5,
    diagonal: bool = False,
) -> str:
    """Curves of the runs over [0, 1] x [0, 1], a panel for each title.

    Args:
        panels: title to run to its (x, y) points; every panel names the runs in the same order.
        x_label: what runs to the right.
        y_label: what rises.
        columns: panels in a row.
        diagonal: draw where both are equal, in the first panel.
    """
    labels = list(next(iter(panels.values())))
    canvas = Canvas(WIDTH, 0)
    head = canvas.legend(labels, 10, 18) + 12
    pane = WIDTH / columns
    height = pane + 20
    canvas.height = head + height * math.ceil(len(panels) / columns)
    ticks = [0, 0.25, 0.5, 0.75, 1] if pane > 300 else [0, 0.5, 1]
    for number, (title, series) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        axes = Axes(pane * column + 48, head + height * row + 24, pane - 62, height - 64, (0, 1), (0, 1))
        axes.draw(canvas, ticks, ticks, x_label, y_label if column == 0 else "")
        canvas.text(axes.left, axes.top - 8, title.replace("_", " "), 12, font_weight="600")
        if diagonal and number == 0:
            canvas.line([(axes.x(end), axes.y(end)) for end in (0, 1)], _MUTED)
        for place, points in enumerate(series.values()):
            colour, dash = style(place)
            canvas.line([(axes.x(x), axes.y(y)) for x, y in points], colour, 2, dash)
            for x, y in points if len(points) <= 12 else ():
                canvas.dot(axes.x(x), axes.y(y), colour, 3.5)
    return str(canvas)


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], y_label: str) -> str:
    """Grouped bars: for each group one bar of every run.

    Args:
        groups: names below the bars.
        series: run to a value for each group, None for none.
        y_label: what rises.
    """
    canvas = Canvas(WIDTH, 0)
    head = canvas.legend(list(series), 10, 18) + 12
    canvas.height = head + 238
    values = [value for column in series.values() for value in column if value is not None]
    ticks = nice_ticks(0, max(values, default=0.0) or 1.0)
    axes = Axes(54, head + 10, WIDTH - 70, 200, (0, len(groups)), (0, ticks[-1]))
    axes.draw(canvas, [], ticks, "", y_label)
    width = 0.8 / len(series)
    for number, group in enumerate(groups):
        canvas.text(axes.x(number + 0.5), axes.bottom + 17, group.replace("_", " "), 11, "middle")
        for place, (label, column) in enumerate(series.items()):
            if (value := column[number]) is not None:
                left = axes.x(number + 0.1 + place * width)
                canvas.rect(
                    left,
                    axes.y(value),
                    axes.width / len(groups) * width * 0.9,
                    axes.bottom - axes.y(value),
                    style(place).colour,
                    f"{group}, {label}: {value:.4f}",
                )
    return str(canvas)


_LOW, _MIDDLE, _HIGH = (0, 114, 178), (247, 247, 247), (213, 94, 0)
"""Blue, near white and vermillion: a diverging scale that does not lean on red and green."""


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    limit: float,
    label: str,
) -> str:
    """Signed values as colours: blue below 0, vermillion above, grey where there is none.

    Args:
        rows: names at the left.
        columns: names below.
        values: a list for each row.
        limit: the absolute value of full colour; above 0.
        label: what the values are.
    """
    rows = list(map(clipped, rows))
    left = 16 + max(width_of(row, 11) for row in rows)
    cell, row_height = (WIDTH - left - 20) / len(columns), 15
    canvas = Canvas(WIDTH, 44 + row_height * len(rows) + 40)
    _draw_scale(canvas, left, limit, label)
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = 44.0 + row_height * i
        canvas.text(left - 8, y + 11, row, 11, "end")
        for j, value in enumerate(line):
            tip = f"{row}, {columns[j]}: {'none' if value is None else f'{value:+.3g}'}"
            canvas.rect(left + j * cell, y, cell + 0.3, row_height - 1, _diverging(value, limit), tip)
    step = max(1, math.ceil(len(columns) * 60 / (WIDTH - left)))
    for j in range(0, len(columns), step):
        x = left + (j + 0.5) * cell
        canvas.text(x, canvas.height - 22, columns[j], 11, "middle", fill=_MUTED)
    canvas.text(left + (WIDTH - left) / 2, canvas.height - 6, "step", 12, "middle", fill=_MUTED)
    return str(canvas)


def _draw_scale(canvas: Canvas, left: float, limit: float, label: str) -> None:
    for number in range(41):
        canvas.rect(left + number * 5, 12, 5.3, 12, _diverging((number - 20) / 20 * limit, limit))
    for at, value in ((0, -limit), (100, 0), (205, limit)):
        canvas.text(left + at, 36, f"{value:+.2g}" if value else "0", 10, "middle", fill=_MUTED)
    canvas.text(left + 225, 22, label)


def _diverging(value: float | None, limit: float) -> str:
    if value is None or not math.isfinite(value):
        return "#9a9a9a"
    share = max(-1.0, min(1.0, value / limit))
    end = _HIGH if share > 0 else _LOW
    mixed = (round(m + abs(share) * (e - m)) for m, e in zip(_MIDDLE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
