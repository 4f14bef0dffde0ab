"""`describe CHECKPOINT`: what a checkpoint is. Starts without torch."""

from __future__ import annotations

from pathlib import Path

from cpq_train.common.collection import importing_for_good
from cpq_train.common.files import check_regular


def describe(checkpoint: Path) -> None:
    """Print what a checkpoint is: arm, scheme, coverage, provenance, and how every layer is quantized.

    Args:
        checkpoint: A checkpoint of this project.

    Raises:
        UserError: It cannot be read.
    """
    check_regular(checkpoint, "checkpoint")
    with importing_for_good():
        from cpq_train.verbs.description import print_description

    print_description(checkpoint)
