"""Whether points have what a network takes: otherwise spconv fails inside of a multiplication."""

from __future__ import annotations

from cpq_train.common.errors import UserError
from cpq_train.data.points.format import PointFormat
from cpq_train.models import NetworkConfig

OPTION = "model.network.num_point_features"


def check_features(network: NetworkConfig, points: PointFormat) -> None:
    """See that a network takes as many features as points have.

    Raises:
        UserError: It does not; names both.
    """
    seen, taken = len(points.features), network.num_point_features
    if seen != taken:
        raise UserError(
            f"{OPTION} is {taken}, and data.point_columns {points} give {seen} features "
            f"({', '.join(points.features)}): expected the same number"
        )
