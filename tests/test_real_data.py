"""Real nuScenes content through the product: two samples validated, the full-size network on real clouds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cpq_train.arms.structure import build
from cpq_train.arms.subject import Subject
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.voxelization import Voxelizer
from cpq_train.models import NetworkConfig
from cpq_train.models.losses import center_loss
from cpq_train.models.targets import assign_targets
from cpq_train.quantization.ranges.calibration import check_ranges, collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.verbs.cli import main

KEY_FRAMES = ["3e8750f331d7499e9b5123e9eb70f2e2", "fdc39b23ab4242eda6ec5e1e6574fe33"]
"""The two samples whose clouds exist."""

FLOAT = Path("checkpoints/quickstart_float.ckpt")


def test_validate_two_real_samples(realdata_dir: Path, tmp_path: Path) -> None:
    main(
        [
            *("validate", "-c", "configs/quickstart_float.yaml", "--model.weights", str(FLOAT)),
            *("--data.root", str(realdata_dir / "nuscenes_mini_val"), "--data.version", "v1.0-mini"),
            *("--data.num_sweeps", "1", "--data.sample_tokens", json.dumps(KEY_FRAMES)),
            *("--data.num_workers", "0", "--data.cache_dir", str(tmp_path / "cache")),
            *("--trainer.default_root_dir", str(tmp_path / "run"), "--evaluation.engine", "devkit"),
        ]
    )
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["dataset"]["num_samples"] == 2
    assert metrics["dataset"]["version"] == "v1.0-mini"
    submission = json.loads((tmp_path / "run/results_nusc.json").read_text())
    assert sorted(submission["results"]) == sorted(KEY_FRAMES)


@pytest.fixture(scope="module")
def full_size() -> Subject:
    torch.manual_seed(0)
    return build(NetworkConfig(), "qat", Scheme.from_file("configs/schemes/int8.yaml"))


def _key_frames(realdata_dir: Path, cache: Path) -> tuple[Tensor, Tensor, int, Tensor]:
    data = NuScenesDataModule(
        str(realdata_dir / "nuscenes_mini_val"),
        "v1.0-mini",
        num_sweeps=1,
        batch_size=2,
        num_workers=0,
        sample_tokens=KEY_FRAMES,
        cache_dir=str(cache),
    )
    batch = next(iter(data.evaluation_dataloader()))
    return batch["voxel_features"], batch["voxel_coords"], 2, batch["gt_boxes"]


def _ten_sweeps(realdata_dir: Path) -> tuple[Tensor, Tensor, int, Tensor]:
    (file,) = (realdata_dir / "lidar").glob("*.fp16x5.bin")
    points = np.fromfile(file, np.float16).reshape(-1, 5).astype(np.float32)
    config = NetworkConfig()
    features, coords, _ = Voxelizer(config.voxel_size, config.point_cloud_range, 10, 60000)(points)
    assert 50_000 < len(coords) <= 60_000
    coords = torch.cat([coords.new_zeros(len(coords), 1), coords], 1)
    return features, coords, 1, torch.zeros(1, 1, 10)


@pytest.mark.parametrize("what", ["key frames", "ten sweeps"])
def test_full_size_network_calibrates_and_takes_qat_steps(
    what: str, full_size: Subject, realdata_dir: Path, tmp_path: Path
) -> None:
    data = _key_frames(realdata_dir, tmp_path) if what == "key frames" else _ten_sweeps(realdata_dir)
    features, coords, batch_size, gt_boxes = data
    network = full_size.network
    with collecting_ranges(network):
        network(features, coords, batch_size)
    check_ranges(network)
    before = {n: b.clone() for n, b in network.named_buffers()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-5)
    network.train()
    losses = []
    for _ in range(2):
        targets = assign_targets(gt_boxes, network.config)
        loss = center_loss(network(features, coords, batch_size), targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers())


def test_full_size_network_equals_the_integer_reference(full_size: Subject, realdata_dir: Path) -> None:
    features, coords, batch_size, _ = _ten_sweeps(realdata_dir)
    network = full_size.network
    with collecting_ranges(network):
        network(features, coords, batch_size)
    reports = verify_layers(network, (features, coords, batch_size))
    assert len(reports) == 20 + 85 + 2 + 8
    assert sum(report.num_sums for report in reports) > 1e8
    assert [report for report in reports if report.num_mismatched or report.not_covered] == []
