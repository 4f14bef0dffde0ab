"""`verify CHECKPOINT`: the integer reference against the forward pass of training. Starts without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpq_train.common.collection import importing_for_good
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output, check_regular
from cpq_train.common.nuscenes import LIDAR_TOP


def verify(
    checkpoint: Path,
    cloud: list[Path] | None = None,
    root: Path | None = None,
    version: str = "v1.0-trainval",
    split: str = "val",
    lidar_channel: str = LIDAR_TOP,
    num_samples: int = 1,
    num_sweeps: int | None = None,
    max_flipped_share: float = 1e-4,
    engine: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    output: Path | None = None,
) -> None:
    """Prove that a quantized checkpoint computes what an integer engine would.

    Every integer layer is computed again in whole numbers, from the input that it really had: codes, sums
    and outputs have to be equal. Then the whole network runs with the reference in place of these layers:
    what it detects has to be equal. With validation samples of a data set, with clouds, or, by default, with
    simulated key frames.

    Args:
        checkpoint: A PTQ or QAT checkpoint of this project.
        cloud: Files of points, in the columns that the checkpoint was made with.
        root: A data root in the nuScenes format.
        version: Its folder of tables.
        split: The split whose samples are taken, an official one or one of `splits.json`.
        lidar_channel: Name of its LiDAR in table `sensor`.
        num_samples: Samples of the data root, or simulated.
        num_sweeps: Of each sample; null takes what the checkpoint was made with.
        max_flipped_share: Largest share of codes that may be one step apart end to end. Float operations in
            between may differ by some 1e-6 of a value; that moves an 8-bit code, at most 127, across a tie in
            1e-4 of the cases. Codes further apart, and differences inside a layer, are never accepted.
        engine: Deployment file of this checkpoint: its engine has to have the codes of every layer, the heads
            and the detections that the checkpoint has. Of a target whose kernels round on their own the codes
            count alone, within `max_flipped_share`.
        device: Where the checkpoint runs; the reference and an engine run on the CPU.
        output: JSON file to write.

    Raises:
        UserError: Something is above its bound, or the checkpoint, a cloud or an argument is no good.
    """
    _check_arguments(cloud, root, num_samples, num_sweeps, max_flipped_share, output)
    check_regular(checkpoint, "checkpoint")
    with importing_for_good():
        from cpq_train.verbs.verification import Samples, run_verification

    of_root = {"version": version, "val_split": split, "lidar_channel": lidar_channel}
    samples = Samples(cloud or [], root, of_root, num_samples, num_sweeps)
    run_verification(checkpoint, samples, engine, device, max_flipped_share, output)


def _check_arguments(
    cloud: list[Path] | None,
    root: Path | None,
    num_samples: int,
    num_sweeps: int | None,
    max_flipped_share: float,
    output: Path | None,
) -> None:
    if not 0 <= max_flipped_share <= 1:
        raise UserError(f"max_flipped_share is {max_flipped_share}: expected a number between 0 and 1")
    for name, value in (("num_samples", num_samples), ("num_sweeps", num_sweeps)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: expected 1 or more")
    if output is not None:
        check_output(output)
    if cloud and root is not None:
        raise UserError(f"cloud {cloud[0]} and root {root}: expected one of them")
