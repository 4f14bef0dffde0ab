"""Pictures that are drawn with matplotlib: texts in them are texts, and the file appears whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from cpq_train.common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100


@contextmanager
def picture(path: Path, width_inches: float, height_inches: float) -> Iterator[Figure]:
    """A figure to draw on, of 100 pixels an inch; it is written at the end.

    A dollar is a dollar in every text of it, for names are no formulas.

    Args:
        path: The PNG to write; its folder is made.
        width_inches: Of the figure.
        height_inches: Likewise.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure(figsize=(width_inches, height_inches), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, drawn.getvalue())
