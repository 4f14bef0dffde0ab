"""`export CHECKPOINT`: a deployment file of a quantized network, read back before it counts as written."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Literal

import cpq_train.export
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole
from cpq_train.export.sidecar import sidecar_path
from cpq_train.export.writing import check_place, write_portable
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.checkpoint_settings import data_settings_of

RUNTIME_FILE = "deployed_detector.py"
RUNTIME = Path(cpq_train.export.__path__[0]) / RUNTIME_FILE


def export(
    checkpoint: Path,
    output: Path,
    target: Literal["portable"] = "portable",
    with_runtime: bool = False,
) -> None:
    """Write the network of a quantized checkpoint as a file that an engine runs without PyTorch and spconv.

    `portable` is the whole network in one ONNX file of standard operators, rulebooks inside, whose numbers
    are PyTorch's bit for bit in onnxruntime. Beside it lies a JSON file that says where it comes from, what
    goes in and out, and how points become voxels and heads become boxes. Both are written only when the file,
    read again, holds every number of the network.

    Args:
        checkpoint: A PTQ or QAT checkpoint of this project.
        output: The file, which ends in .onnx.
        target: What it is for.
        with_runtime: Also write `deployed_detector.py` beside it, which goes from clouds to boxes with NumPy
            and onnxruntime alone.

    Raises:
        UserError: The checkpoint has layers that the target cannot hold, which are named, or a place is no
            good.
    """
    check_place(output)
    runtime = output.with_name(RUNTIME_FILE)
    if with_runtime and runtime.exists() and not filecmp.cmp(RUNTIME, runtime, shallow=False):
        raise UserError(f"{runtime} exists and is not the runtime of this release: move it away")
    content = read_checkpoint(checkpoint, mmap=True)
    detector = CenterPointDetector.load_from_checkpoint(checkpoint)
    data = data_settings_of(content, checkpoint, detector.network_config)
    said = write_portable(detector.subject, detector.post_processing, data, checkpoint, output)
    print_plain(
        f"written and read back, every number equal: {output} ({said.file['num_bytes'] / 1e6:.2f} MB)\n"
        f"beside it: {sidecar_path(output)}"
    )
    if with_runtime:
        write_whole(runtime, RUNTIME.read_bytes())
        print_plain(f"beside it: {runtime}")
    print_plain(f"compare with the checkpoint: cpq_train verify {checkpoint} --engine {output}")
