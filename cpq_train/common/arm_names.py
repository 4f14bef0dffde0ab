"""The four arms by name; `cpq_train.arms` says what each of them is."""

from __future__ import annotations

from typing import Final, Literal, get_args

Arm = Literal["float", "float_tuned", "ptq", "qat"]

ARMS: tuple[Arm, ...] = get_args(Arm)
"""In the order in which they are compared."""

Row = Literal[Arm, "deployed", "submission"]

DEPLOYED: Final = "deployed"
"""The row of an exported file that an engine runs."""

SUBMISSION: Final = "submission"
"""The row of detections that `score` took from a file, whatever made them."""

ROWS: tuple[Row, ...] = get_args(Row)
"""What a comparison has rows for, in its order."""

FLOAT_ARMS: tuple[Arm, ...] = ("float", "float_tuned")
QUANTIZED_ARMS: tuple[Arm, ...] = ("ptq", "qat")

TUNED_ARMS: tuple[Arm, ...] = ("qat", "float_tuned")
"""Made from another arm's checkpoint by training."""

DESCENDANTS: dict[Arm, tuple[Arm, ...]] = {
    "float": ARMS,
    "float_tuned": ("float_tuned",),
    "ptq": ("ptq", "qat", "float_tuned"),
    "qat": ("qat",),
}
"""What the checkpoint of an arm can become, itself included."""
