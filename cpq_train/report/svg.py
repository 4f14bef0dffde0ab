"""As much of SVG as the charts of a report need: marks, axes, a legend.

Colours of text and grid are CSS variables, so that a chart inside a page follows its light or dark theme;
alone, as a file, it has the values that stand behind the comma. Series take the colours of Okabe and Ito,
"Color Universal Design" (https://jfly.uni-koeln.de/color/), and are told apart by their dashes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpq_train.common.text import in_markup

PALETTE = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "14 4")

_TEXT, _MUTED, _GRID, _PAPER = (
    "var(--text, #1b1f24)",
    "var(--muted, #57606a)",
    "var(--grid, #d8dee4)",
    "var(--paper, #ffffff)",
)
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
_CHARACTER = 0.58
"""Mean width of a character, of the font size."""
_MAX_CHARACTERS = 80
"""Of a label beside a chart or in its legend; names of runs may have 255."""
_MAX_TICKS = 6
_LEAST_SPAN = 1e-3
"""Of an axis; scores have four digits."""


class Style(NamedTuple):
    """How a series is drawn."""

    colour: str
    dash: str


def style(number: int) -> Style:
    """The style of a series by its number: no two of the first 42 are alike."""
    return Style(PALETTE[number % len(PALETTE)], DASHES[number % len(DASHES)])


def clipped(label: str) -> str:
    """A label that leaves room for the chart beside it."""
    return label if len(label) <= _MAX_CHARACTERS else f"{label[: _MAX_CHARACTERS - 1]}…"


def width_of(text: str, size: float = 12) -> float:
    """About how wide a text becomes."""
    return len(text) * size * _CHARACTER


@dataclass
class Canvas:
    """Marks in the order in which they are drawn; lengths are pixels from the top left."""

    width: float
    height: float
    marks: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, size: float = 12, anchor: str = "start", **more: str
    ) -> None:
        """A line of text on its base line; `more` are attributes such as fill."""
        attributes = {"fill": _TEXT, **{name.replace("_", "-"): value for name, value in more.items()}}
        self._add(
            "text", {"x": x, "y": y, "font-size": size, "text-anchor": anchor, **attributes}, in_markup(text)
        )

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, width: float = 1, dash: str = ""
    ) -> None:
        """A line through points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = {"stroke-dasharray": dash} if dash else {}
        self._add(
            "polyline",
            {"points": joined, "fill": "none", "stroke": colour, "stroke-width": width, **dashes},
        )

    def rect(self, x: float, y: float, width: float, height: float, colour: str, tip: str = "") -> None:
        """A filled rectangle, with a text that a browser shows on hovering."""
        title = f"<title>{in_markup(tip)}</title>" if tip else ""
        self._add("rect", {"x": x, "y": y, "width": width, "height": height, "fill": colour}, title)

    def dot(self, x: float, y: float, colour: str, radius: float = 4.5) -> None:
        """A filled circle."""
        self._add("circle", {"cx": x, "cy": y, "r": radius, "fill": colour})

    def legend(self, labels: Sequence[str], x: float, y: float) -> float:
        """Names of the series beside their line, in as many rows as the width asks for.

        Returns:
            How far down it reaches, px.
        """
        left = x
        for number, label in enumerate(map(clipped, labels)):
            needed = 34 + width_of(label) + 14
            if left > x and left + needed > self.width:
                left, y = x, y + 18
            colour, dash = style(number)
            self.line([(left, y - 4), (left + 26, y - 4)], colour, 3, dash)
            self.text(left + 32, y, label)
            left += needed
        return y

    def __str__(self) -> str:
        size = f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}"'
        paper = f'<rect width="100%" height="100%" fill="{_PAPER}"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{_FONT}">'
            f"{paper}{''.join(self.marks)}</svg>"
        )

    def _add(self, tag: str, attributes: dict[str, str | float], content: str = "") -> None:
        pairs = " ".join(f'{name}="{_value(value)}"' for name, value in attributes.items())
        self.marks.append(f"<{tag} {pairs}>{content}</{tag}>" if content else f"<{tag} {pairs}/>")


def _value(value: str | float) -> str:
    return in_markup(value) if isinstance(value, str) else f"{value:.6g}"


@dataclass(frozen=True)
class Axes:
    """A rectangle of the canvas with a linear scale on each side.

    Attributes:
        left, top, width, height: the rectangle, px.
        x_range, y_range: values at its left and right, bottom and top.
    """

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Where a value lies, px."""
        return self.left + self.width * (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])

    def y(self, value: float) -> float:
        """Where a value lies, px."""
        return self.top + self.height * (self.y_range[1] - value) / (self.y_range[1] - self.y_range[0])

    @property
    def bottom(self) -> float:
        """Where the horizontal axis lies, px."""
        return self.top + self.height

    def draw(
        self,
        canvas: Canvas,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_label: str,
        y_label: str = "",
    ) -> None:
        """Grid lines with their values, and what the axes say."""
        for tick in x_ticks:
            canvas.line([(self.x(tick), self.top), (self.x(tick), self.bottom)], _GRID)
            canvas.text(self.x(tick), self.bottom + 15, f"{tick:g}", 11, "middle", fill=_MUTED)
        for tick in y_ticks:
            canvas.line([(self.left, self.y(tick)), (self.left + self.width, self.y(tick))], _GRID)
            canvas.text(self.left - 6, self.y(tick) + 4, f"{tick:g}", 11, "end", fill=_MUTED)
        canvas.text(self.left + self.width / 2, self.bottom + 31, x_label, 12, "middle", fill=_MUTED)
        if y_label:
            x, y = self.left - 34, self.top + self.height / 2
            canvas.text(x, y, y_label, 12, "middle", fill=_MUTED, transform=f"rotate(-90 {x:g} {y:g})")


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose a range: multiples of 1, 2 or 5 times a power of 10.

    There are at least two of them; a range without width gets a little on either side.
    """
    if high - low < _LEAST_SPAN:
        low, high = low - _LEAST_SPAN, high + _LEAST_SPAN
    span = high - low
    steps = sorted(base * 10.0**power for power in range(-9, 10) for base in (1, 2, 5))
    step = next(step for step in steps if span / step <= _MAX_TICKS - 2)
    first, last = int(low // step), -int(-high // step)
    return [round(number * step, 10) for number in range(first, last + 1)]
