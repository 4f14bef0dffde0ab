"""What `export` does: a deployment file, read back before it counts as written, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpq_train.arms.loading import write_subject
from cpq_train.arms.snapped_biases import Moved, snap_biases
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output, sha256_of, write_whole
from cpq_train.export.names import RUNTIME, RUNTIME_FILE, TargetName, sidecar_path
from cpq_train.export.planning import plan_of
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.checkpoint_settings import data_settings_of

if TYPE_CHECKING:
    from cpq_train.export.targets import Target


def deploy(checkpoint: Path, output: Path, target: TargetName, with_runtime: bool, snap_biases: bool) -> None:
    """Write a deployment file and what belongs beside it; see `export`, which has checked the arguments.

    Raises:
        UserError: The checkpoint has layers that the target cannot hold, which are named, or a place is no
            good.
    """
    from cpq_train.export.targets import TARGETS  # these need onnx
    from cpq_train.export.writing import write_deployment

    content = read_checkpoint(checkpoint, mmap=True)
    detector = CenterPointDetector.load_from_checkpoint(checkpoint)
    data = data_settings_of(content, checkpoint, detector.network_config)
    chosen = TARGETS[target]
    if snap_biases and detector.subject.is_quantized:  # others are refused below
        checkpoint = _snap(chosen, detector, checkpoint, output)
    how = detector.subject, detector.post_processing, data
    said, plan = write_deployment(target, *how, checkpoint, output)
    print_plain(
        f"written and read back, every number equal: {output} ({said.file['num_bytes'] / 1e6:.2f} MB)\n"
        f"beside it: {sidecar_path(output)}"
    )
    if with_runtime:
        runtime = output.with_name(RUNTIME_FILE)
        write_whole(runtime, RUNTIME.read_bytes())
        print_plain(f"beside it: {runtime}")
    for line in chosen.remarks(plan, output):
        print_plain(line)
    if target != "libspconv":
        print_plain(f"compare with the checkpoint: cpq_train verify {checkpoint} --engine {output}")


def _snap(target: Target, detector: CenterPointDetector, checkpoint: Path, output: Path) -> Path:
    """Round the biases of a detector to what a target has.

    Returns:
        The checkpoint that has them: another one beside the output, or the given one where it has them.

    Raises:
        UserError: The target cannot hold the network with these biases either, or the place of the checkpoint
            is no good.
    """
    from cpq_train.export.writing import plan_for  # this needs onnx

    subject, source = detector.subject, sha256_of(checkpoint)
    snapped = output.with_name(f"{output.stem}.snapped.ckpt")
    check_output(snapped)
    plan_of(subject.network, target.part)  # refuses dynamic ranges too, which have no step
    moved = snap_biases(subject, target.snapped)
    if not moved:
        print_plain(f"no bias of {checkpoint} is to be snapped")
        return checkpoint
    _check_snapped(snapped, subject.arm, source)
    plan_for(target, detector.network)  # nothing is written of what is refused
    subject.parents = {**subject.parents, subject.arm: source}
    write_subject(subject, checkpoint, snapped)
    print_plain(_sentence(moved))
    print_plain(f"checkpoint with these biases: {snapped}")
    return snapped


def _check_snapped(snapped: Path, arm: str, source: str) -> None:
    """Whether a snapped checkpoint may take a place.

    Raises:
        UserError: There is something else than an older one of the same source.
    """
    if not snapped.exists():
        return
    try:
        parents = read_checkpoint(snapped, mmap=True)["quantization"]["parents"]
        is_ours = parents.get(arm) == source
    except (UserError, LookupError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(
            f"the checkpoint with other biases would replace {str(snapped)!r}, which is something else; "
            "choose another name"
        )


def _sentence(moved: list[Moved]) -> str:
    farthest = max(moved, key=lambda one: one.largest)
    mean = sum(one.mean for one in moved) / len(moved)
    kinds = " and ".join(sorted({one.kind for one in moved}))
    return (
        f"biases of {len(moved)} layers snapped to {kinds}: by {mean:.2g} in the mean, by up to "
        f"{farthest.largest:.2g} in {farthest.layer} ({farthest.share:.2%} of its largest bias)"
    )
