"""What `verify` does: batches through a checkpoint and its stand-ins, and what was found."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.table import Table
from torch import Tensor

from cpq_train.arms.description import Description
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of, write_whole
from cpq_train.common.progress import track
from cpq_train.data.clouds import batch_of_clouds
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import Batch, SampleConfig
from cpq_train.data.points.checks import check_cloud
from cpq_train.data.settings import DataSettings
from cpq_train.data.sweeps import NUSCENES_POINTS, read_cloud
from cpq_train.export.engine import Engine
from cpq_train.export.plan import differences
from cpq_train.models import CenterPoint
from cpq_train.models.decode import PostProcessing
from cpq_train.quantization.ranges.bias_steps import check_biases
from cpq_train.quantization.verification.end_to_end import FLIP_REASON, verify_end_to_end
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.simulator import simulate
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.features import check_features
from cpq_train.training.settings import HYPER_PARAMETERS
from cpq_train.verbs.checkpoint_settings import data_settings_of
from cpq_train.verbs.findings import EndToEnd, Findings

if TYPE_CHECKING:
    from cpq_train.export.comparison import Probe

KERNEL_REASON = (
    "the engine's kernels scale their sums in steps of their own; a value beside a tie takes the next code"
)
SIMULATED_VERSION: Final = "v1.0-mini"
SIMULATED_SEED = 0


@dataclass(frozen=True)
class Samples:
    """What a checkpoint is verified on: clouds, or samples of a data root, or simulated ones.

    Args:
        clouds: Files of points.
        root: A data root, None where samples are simulated.
        of_root: Arguments of the data module that say which samples of it.
        number: Of samples of a root.
        num_sweeps: Of each; None takes what the checkpoint was made with.
    """

    clouds: Sequence[Path]
    root: Path | None
    of_root: Mapping[str, Any]
    number: int
    num_sweeps: int | None


def run_verification(
    checkpoint: Path,
    samples: Samples,
    engine: Path | None,
    device: str,
    max_flipped_share: float,
    output: Path | None,
) -> None:
    """Verify a checkpoint; see `verify`, which has checked the arguments.

    Raises:
        UserError: Something is above its bound, or the checkpoint, a cloud, the root or device is no good.
    """
    _check_device(device)
    content = read_checkpoint(checkpoint, mmap=True)
    _check_verifiable(content, checkpoint)
    detector = CenterPointDetector.load_from_checkpoint(checkpoint)
    check_biases(detector.network, f"checkpoint {str(checkpoint)!r}: ")
    data = data_settings_of(content, checkpoint, detector.network_config)
    data = replace(data, num_sweeps=samples.num_sweeps or data.num_sweeps)
    check_features(detector.network_config, data.points)
    if not (samples.clouds or samples.root):
        _check_simulated(data, checkpoint)
    detector.to(device)
    findings = Findings()
    probe = None if engine is None else _probe(engine, checkpoint, detector, findings)
    with _batches(data, samples) as batches:
        for batch in track(batches, "Verifying", len(samples.clouds) or samples.number):
            moved = detector.to_device(dict(batch))
            inputs = moved["voxel_features"], moved["voxel_coords"], moved["batch_size"]
            verify_sample(detector.network, inputs, detector.post_processing, findings, probe)
    _conclude(checkpoint, findings, max_flipped_share, output)


def _conclude(checkpoint: Path, findings: Findings, max_flipped_share: float, output: Path | None) -> None:
    """Print what was found and write it.

    Raises:
        UserError: Something is above its bound.
    """
    failures = findings.failures(max_flipped_share)
    _print(findings)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(_document(checkpoint, findings, failures), indent=2) + "\n")
    if failures:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is not what it computes:\n  " + "\n  ".join(failures)
        )


def _check_verifiable(content: dict[str, Any], path: Path) -> None:
    """Whether a checkpoint has layers to verify.

    Raises:
        UserError: It is of another network, has no integer layer, or does not hold its sizes.
    """
    said, quantization = Description.of(content, path), content["quantization"]
    said.check_centerpoint(path)
    if not any(layer["arithmetic"] == "integer" for layer in quantization["layers"].values()):
        raise UserError(
            f"checkpoint {str(path)!r}, arm {said.arm!r}, has no integer layer: nothing to "
            "verify; calibrate makes a checkpoint that has"
        )
    if HYPER_PARAMETERS not in content:
        raise UserError(f"checkpoint {str(path)!r} does not hold its sizes (no {HYPER_PARAMETERS!r})")


def _check_device(device: str) -> None:
    """Whether this machine has it.

    Raises:
        UserError: It has not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', and this machine has no CUDA device; accepted: cpu")


def _check_simulated(settings: DataSettings, checkpoint: Path) -> None:
    """Whether simulated clouds, which are nuScenes' in form, have what the network sees.

    Raises:
        UserError: They do not.
    """
    if settings.points.features != NUSCENES_POINTS.features:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} was made with data.point_columns {settings.points}, which "
            "simulated samples do not have: give --cloud FILE or --root DIR"
        )


@contextmanager
def _batches(settings: DataSettings, samples: Samples) -> Iterator[Iterator[Batch]]:
    if samples.clouds:
        yield (_batch_of(path, settings) for path in samples.clouds)
        return
    root, of_root = samples.root, samples.of_root
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            settings = replace(settings, point_columns=NUSCENES_POINTS.columns, intensity_scale=1.0)
            root, of_root = Path(folder) / "simulated", {"version": SIMULATED_VERSION}
            simulate(
                root,
                num_scenes=1,
                num_val_scenes=1,
                num_samples_per_scene=samples.number,
                version=SIMULATED_VERSION,
                seed=SIMULATED_SEED,
            )
        data = NuScenesDataModule(
            str(root),
            **of_root,
            **settings.to_dict(),
            batch_size=1,
            num_workers=0,
        )
        if samples.number > len(data.eval_rows):
            raise UserError(
                f"num_samples is {samples.number}: {root} has {len(data.eval_rows)} for validation"
            )
        yield islice(data.evaluation_dataloader(), samples.number)


def _batch_of(path: Path, settings: DataSettings) -> Batch:
    """A cloud file as a batch of one sample."""
    sample = replace(SampleConfig.of_evaluation(settings), num_sweeps=1)
    check_cloud(path, sample.points)
    return batch_of_clouds([read_cloud(path, points=sample.points)], sample, [path.name])


def _probe(file: Path, checkpoint: Path, detector: CenterPointDetector, findings: Findings) -> Probe:
    """A look into the engine of a deployment file.

    Raises:
        UserError: It was exported from another checkpoint.
    """
    from cpq_train.export.comparison import Probe  # these need onnx
    from cpq_train.export.writing import plan_for

    engine = Engine(file, checkpoint, lambda: detector.network)
    probe = Probe(engine)
    findings.engine = EndToEnd(f"{engine.name} {engine.version}", is_exact=probe.target.is_exact)
    findings.other_numbers = differences(plan_for(probe.target, detector.network), probe.plan)
    return probe


def verify_sample(
    network: CenterPoint,
    inputs: tuple[Tensor, Tensor, int],
    post_processing: PostProcessing,
    findings: Findings,
    probe: Probe | None = None,
) -> None:
    """Compare a network with its stand-ins on one sample.

    Args:
        network: Calibrated, wherever it is.
        inputs: Arguments of its forward pass, there too.
        post_processing: From its outputs to boxes.
        findings: What is found is added here.
        probe: A look into an engine, where there is one.

    Raises:
        UserError: See `verify_layers` and `verify_end_to_end`.
    """
    for report in verify_layers(network, inputs):
        known = findings.layers.get(report.name)
        findings.layers[report.name] = report if known is None else known + report
    how = network.config, post_processing
    outputs = verify_end_to_end(network, inputs, findings.reference.flips)
    findings.reference.count_detections(*outputs, *how)
    if probe is not None and findings.engine is not None:
        pair = probe.compare(network, inputs, findings.engine.flips)
        findings.engine.count_detections(*pair, *how)


def _print(findings: Findings) -> None:
    table = Table(title="Layers against the integer reference", title_justify="left")
    for header in ("layer", "kind", "arithmetic"):
        table.add_column(header)
    wrong = (f"mismatched {what}" for what in ("codes", "sums", "outputs"))
    for header in ("compared", *wrong, "largest difference"):
        table.add_column(header, justify="right")
    table.add_column("where")
    for r in findings.layers.values():
        counts = (r.num_sums, r.mismatched_codes, r.mismatched_sums, r.mismatched_outputs)
        numbers = [""] * 5 if r.not_covered else [*(f"{n:,}" for n in counts), f"{r.largest_difference:g}"]
        where = f"not covered: {r.not_covered}" if r.not_covered else r.where
        table.add_row(r.name, r.kind, r.arithmetic, *numbers, where)
    print_plain(table)
    for end_to_end in filter(None, (findings.reference, findings.engine)):
        print_plain(end_to_end.sentence())
        by_layer = end_to_end.flips.by_layer
        if by_layer:
            first, count = next(iter(by_layer.items()))
            reason = FLIP_REASON if end_to_end.is_exact else KERNEL_REASON
            print_plain(f"codes first differ at {first} ({count:,}): {reason}")


def _document(checkpoint: Path, findings: Findings, failures: list[str]) -> dict[str, Any]:
    return {
        "schema": 1,
        "checkpoint": {"path": str(checkpoint), "sha256": sha256_of(checkpoint)},
        **findings.document(),
        **({} if findings.engine is None else {"engine": findings.engine.document()}),
        "failures": failures,
    }
