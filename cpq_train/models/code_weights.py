"""Loss weights of the ten numbers of a box code: x, y, z, three log sizes, cosine, sine, two velocities.

All three ancestors write eight ones and two 0.2, and mean the velocity; OpenPCDet's code has the rotation in
that place, which is what its published numbers were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from cpq_train.common.errors import UserError

Ancestor = Literal["openpcdet", "tianweiy", "mmdet3d"]

ANCESTORS: Mapping[Ancestor, tuple[float, ...]] = MappingProxyType(
    {
        "openpcdet": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2, 1.0, 1.0),
        "tianweiy": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2),
        "mmdet3d": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2),
    }
)
"""The published weights, in the order of this project's box code."""

CODE_WEIGHTS = ANCESTORS["openpcdet"]


def resolve_code_weights(value: Ancestor | Sequence[float]) -> tuple[float, ...]:
    """Ten weights from the name of an ancestor or from ten numbers.

    Raises:
        UserError: the name is unknown, or there are not ten numbers of 0 or more.
    """
    if isinstance(value, str):
        if value not in ANCESTORS:
            raise UserError(f"code_weights is {value!r}: accepted are {', '.join(ANCESTORS)} or ten numbers")
        return ANCESTORS[value]
    weights = tuple(float(weight) for weight in value)
    if len(weights) != len(CODE_WEIGHTS) or not all(weight >= 0 for weight in weights):
        raise UserError(
            f"code_weights is {list(weights)}: expected ten numbers of 0 or more, or one of "
            f"{', '.join(ANCESTORS)}"
        )
    return weights
