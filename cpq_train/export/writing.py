"""Writes a deployment file and its sidecar: neither appears unless the file, read again, is the plan."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cpq_train.arms.subject import Subject
from cpq_train.common.errors import UserError
from cpq_train.common.files import replacing, sha256_of
from cpq_train.data.settings import DataSettings
from cpq_train.export.graph import onnx
from cpq_train.export.names import check_place, sidecar_path
from cpq_train.export.parts import MAP
from cpq_train.export.plan import COORDS, FEATURES, Plan, differences
from cpq_train.export.planning import output_name, plan_of, refuse
from cpq_train.export.sidecar import Sidecar
from cpq_train.export.targets import TARGETS, Target
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.center_head import branches_of
from cpq_train.models.decode import PostProcessing
from cpq_train.quantization.coverage import coverage_of

BRANCH_MEANING = {
    "center": "offset of the centre in its cell (x, y), cells",
    "center_z": "height of the centre, m",
    "dim": "logarithm of length, width, height in m",
    "rot": "cosine, sine of the yaw",
    "vel": "velocity (x, y), m/s",
    "hm": "score of each class of the group before the sigmoid",
}
FEATURE_MEANING = {"z": "z (m)", "intensity": "intensity (0 to 255)", "time_lag": "time lag (s)"}
MEANINGS = {
    COORDS: "cell of each voxel along z, y, x; each cell once, in any order",
    MAP: "features of the voxels as a map, channel = c * depth + z, 0 where no voxel is",
}
"""Name of an input, or of an output that is no head's -> what it is."""


def plan_for(target: Target, network: CenterPoint) -> Plan:
    """The plan of a network as a target has it.

    Raises:
        UserError: Layers cannot be exported; names each and says why.
    """
    plan = target.as_said(plan_of(network, target.part))
    refuse(target.why_not(plan))
    return plan


def write_deployment(
    target: str,
    subject: Subject,
    post_processing: PostProcessing,
    data: DataSettings,
    checkpoint: Path,
    output: Path,
) -> tuple[Sidecar, Plan]:
    """Export a network as the file of a target.

    Args:
        target: Name of one of `TARGETS`.
        subject: A quantized network.
        post_processing: From heads to boxes, for the sidecar.
        data: From points to voxels, for the sidecar.
        checkpoint: Where the network comes from.
        output: The file, which ends in .onnx; the sidecar lies beside it.

    Returns:
        The sidecar; what the file holds.

    Raises:
        UserError: A layer cannot be exported, the place is no good, or what was written is not the plan.
    """
    check_place(output)
    if not subject.is_quantized:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is of arm {subject.arm!r}, whose layers are float ones; "
            "accepted: ptq and qat"
        )
    chosen = TARGETS[target]
    plan = plan_for(chosen, subject.network)
    source = {
        "path": str(checkpoint),
        "sha256": sha256_of(checkpoint),
        "arm": subject.arm,
        "parents": dict(subject.parents),
        **({"trained_on": dict(subject.trained_on)} if subject.trained_on else {}),
    }
    about = f"CenterPoint, {subject.arm}, from the checkpoint with SHA-256 {source['sha256']}"
    model = chosen.model_of(plan, version("cpq_train"), about)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, model.ByteSize()) as partial:
        onnx.save(model, str(partial))
        check_written(partial, plan, chosen)
    sidecar = _sidecar(target, model, subject, post_processing, data, source, output)
    sidecar.write(sidecar_path(output))
    return sidecar, plan


def check_written(file: Path, plan: Plan, target: Target) -> None:
    """Read a file of a target again and compare it with its plan, bit for bit.

    Raises:
        UserError: They differ.
    """
    if different := differences(plan, target.read_plan(file)):
        raise UserError(f"{file}: what was written is not the plan:\n  " + "\n  ".join(different))


def _sidecar(
    target: str,
    model: Any,
    subject: Subject,
    post_processing: PostProcessing,
    data: DataSettings,
    source: dict[str, Any],
    output: Path,
) -> Sidecar:
    config, geometry = subject.network.config, subject.network.geometry
    assert subject.scheme is not None
    features = ", ".join(FEATURE_MEANING.get(name, name) for name in data.points.features)
    meanings = {**MEANINGS, FEATURES: f"mean of the points of each voxel: {features}"}
    return Sidecar(
        target=target,
        file={"name": output.name, "sha256": sha256_of(output), "num_bytes": output.stat().st_size},
        checkpoint=source,
        scheme=subject.scheme.to_dict(),
        coverage={kind: list(counts) for kind, counts in coverage_of(subject.prepared).counts.items()},
        versions={
            "cpq_train": version("cpq_train"),
            "torch": str(torch.__version__),
            "onnx": version("onnx"),
            "opset": model.opset_import[0].version,
        },
        inputs=[_end(one, meanings[one.name]) for one in model.graph.input],
        outputs=[_output(one, config) for one in model.graph.output],
        class_names=list(config.class_names),
        head_map={"stride": geometry.stride, "width": geometry.width, "height": geometry.height},
        network=asdict(config),
        data=data.to_dict(),
        post_processing=asdict(post_processing.reaching(config.point_cloud_range)),
    )


def _output(one: Any, config: NetworkConfig) -> dict[str, Any]:
    """What is said of an output of a file: a map of the head, or the map at the seam."""
    for head, group in enumerate(config.class_groups):
        for branch in branches_of(len(group)):
            if one.name == output_name(head, branch):
                return {**_end(one, BRANCH_MEANING[branch]), "head": head, "branch": branch}
    return _end(one, MEANINGS[one.name])


def _end(one: Any, meaning: str) -> dict[str, Any]:
    """What is said of an input or output of a file."""
    tensor = one.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {"name": one.name, "dtype": dtype, "shape": shape, "meaning": meaning}
