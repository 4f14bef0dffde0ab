"""Axes of the weights of sparse convolutions, by the spconv that wrote them.

Letters: K output channels, R S T kernel along z, y, x, C input channels. Ours is K R S T C, as spconv 2's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from cpq_train.common.errors import UserError

SparseLayout: TypeAlias = Literal["krsc", "rsck", "rskc"]
"""krsc: spconv 2. rsck: spconv 1. rskc: algorithm Native of spconv 2.0 and 2.1."""

Shape: TypeAlias = tuple[int, ...]

TO_KRSC: dict[SparseLayout, tuple[int, int, int, int, int]] = {
    "krsc": (0, 1, 2, 3, 4),
    "rsck": (4, 0, 1, 2, 3),
    "rskc": (3, 0, 1, 2, 4),
}
"""Layout -> its axes in the order of ours."""


def choose_layout(shapes: Mapping[str, tuple[Shape, Shape]], asked: SparseLayout | None) -> SparseLayout:
    """The one layout that all sparse weights of a file have.

    Args:
        shapes: Name -> shape in the file, and shape of ours (K, R, S, T, C).
        asked: What the user says; needed only where the shapes leave several.

    Raises:
        UserError: No layout fits, several fit and none is asked for, or the shapes contradict `asked`.
    """
    misfits = {layout: _first_misfit(shapes, layout) for layout in get_args(SparseLayout)}
    fitting = [layout for layout, misfit in misfits.items() if misfit is None]
    if not fitting:
        closest = asked or max(misfits, key=lambda layout: list(shapes).index(str(misfits[layout])))
        raise UserError(
            f"the sparse weights have no layout in common, or other sizes than `config` says: "
            f"{_text(shapes, misfits[closest])}"
        )
    if asked is not None and asked not in fitting:
        raise UserError(
            f"sparse_layout {asked!r} contradicts the shapes: {_text(shapes, misfits[asked])}; "
            f"they fit {' and '.join(fitting)}"
        )
    if asked is None and len(fitting) > 1:
        raise UserError(
            f"the shapes of the sparse weights fit the layouts {', '.join(fitting)}: say which with "
            "sparse_layout (krsc: spconv 2, rsck: spconv 1, rskc: Native of spconv 2.0 and 2.1)"
        )
    return asked or fitting[0]


def _first_misfit(shapes: Mapping[str, tuple[Shape, Shape]], layout: SparseLayout) -> str | None:
    """The first name whose shape is another one in `layout`."""
    axes = TO_KRSC[layout]
    for name, (theirs, ours) in shapes.items():
        if len(theirs) != len(axes) or tuple(theirs[axis] for axis in axes) != ours:
            return name
    return None


def _text(shapes: Mapping[str, tuple[Shape, Shape]], name: str | None) -> str:
    assert name is not None
    theirs, ours = shapes[name]
    return f"{name} is {theirs} in the file, {ours} (out, z, y, x, in) here"
