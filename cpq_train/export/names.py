"""What a deployment file may be called, for whom it may be, and where what belongs to it lies.

Starts without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output

TargetName = Literal["portable", "portable-fast", "tensorrt", "libspconv"]

WHOLE_TARGETS = ("portable", "portable-fast")
"""Those whose files are whole networks."""

DENSE_TARGETS = ("tensorrt",)
"""Those whose files are dense parts: they run behind the sparse part of the checkpoint that they are of."""

ENGINE_SUFFIX = ".onnx"

RUNTIME_FILE = "deployed_detector.py"
RUNTIME = Path(__file__).with_name(RUNTIME_FILE)


def sidecar_path(engine_file: Path) -> Path:
    """Where the sidecar of a deployment file lies."""
    return engine_file.with_suffix(".json")


def check_place(output: Path) -> None:
    """Whether a deployment file may be written there.

    Raises:
        UserError: It does not end in .onnx, cannot be written, or the place of its sidecar is taken by
            something else.
    """
    if output.suffix != ENGINE_SUFFIX:
        raise UserError(f"output {str(output)!r}: expected a file that ends in .onnx")
    check_output(output)
    beside = sidecar_path(output)
    if not beside.exists():
        return
    try:
        is_sidecar = {"target", "file", "checkpoint"} <= read_json(beside, "sidecar").keys()
    except (UserError, AttributeError):
        is_sidecar = False
    if not is_sidecar:
        raise UserError(
            f"output {str(output)!r}: its sidecar would replace {str(beside)!r}, which is something else; "
            "choose another name"
        )
