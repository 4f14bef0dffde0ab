"""`export CHECKPOINT`: a deployment file of a quantized network. Starts without torch."""

from __future__ import annotations

import filecmp
from pathlib import Path

from cpq_train.common.collection import importing_for_good
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_regular
from cpq_train.export.names import RUNTIME, RUNTIME_FILE, WHOLE_TARGETS, TargetName, check_place


def export(
    checkpoint: Path,
    output: Path,
    target: TargetName = "portable",
    with_runtime: bool = False,
    snap_biases: bool = False,
) -> None:
    """Write the network of a quantized checkpoint as a file that an engine runs without PyTorch and spconv.

    `portable` is the whole network in one ONNX file of standard operators, rulebooks inside, whose numbers
    are PyTorch's bit for bit in onnxruntime. `portable-fast` has kernels of 8 bits throughout its dense part:
    a code in a million may be another one. `tensorrt` is the dense part with Q/DQ, as TensorRT 10 takes it;
    `libspconv` the sparse part in the dialect of NVIDIA's engine; together they are the whole network.

    Beside the file lies a JSON file that says where it comes from, what goes in and out, and how points
    become voxels and heads become boxes. Both are written only when the file, read again, holds every number
    of the network in the types that the target has.

    Args:
        checkpoint: A PTQ or QAT checkpoint of this project.
        output: The file, which ends in .onnx.
        target: What it is for.
        with_runtime: Also write `deployed_detector.py` beside it, which goes from clouds to boxes with NumPy
            and onnxruntime alone; for the portable targets.
        snap_biases: Round the biases first, where the scheme has not done so, to what the target has: whole
            multiples of a sum's step, or fp16. The checkpoint with these biases is written beside the file.

    Raises:
        UserError: The checkpoint has layers that the target cannot hold, which are named, or a place is no
            good.
    """
    check_place(output)
    _check_runtime(target, output, with_runtime)
    check_regular(checkpoint, "checkpoint")
    with importing_for_good():
        from cpq_train.verbs.deployment import deploy

    deploy(checkpoint, output, target, with_runtime, snap_biases)


def _check_runtime(target: str, output: Path, with_runtime: bool) -> None:
    if not with_runtime:
        return
    if target not in WHOLE_TARGETS:
        raise UserError(
            f"--with_runtime with target {target!r}, which is a part of a network; accepted with "
            f"{', '.join(WHOLE_TARGETS)}"
        )
    runtime = output.with_name(RUNTIME_FILE)
    if runtime.exists() and not filecmp.cmp(RUNTIME, runtime, shallow=False):
        raise UserError(f"{runtime} exists and is not the runtime of this release: move it away")
