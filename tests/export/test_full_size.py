"""Networks of the published sizes on a real cloud of ten sweeps: the exported file against PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cpq_train.arms.structure import build
from cpq_train.arms.subject import Subject
from cpq_train.data.settings import DataSettings
from cpq_train.data.voxelization import Voxelizer
from cpq_train.export.engine import Engine
from cpq_train.export.writing import write_deployment
from cpq_train.models import NetworkConfig
from cpq_train.models.decode import PostProcessing
from cpq_train.quantization.ranges.bias_steps import widen_steps
from cpq_train.quantization.ranges.calibration import check_ranges, collecting_ranges
from cpq_train.quantization.scheme import Scheme

NAMES = {"01": (50_000, 60_000), "0075": (60_000, 160_000)}
"""Configuration -> bounds of the number of voxels."""


def _settings(name: str) -> tuple[NetworkConfig, int]:
    """Sizes and cap of voxels of a configuration."""
    said = yaml.safe_load(Path(f"configs/centerpoint_voxel{name}.yaml").read_text())
    network = NetworkConfig(**said["model"].get("network", {}))
    cap: int = said["data"]["max_num_voxels_eval"]
    return network, cap


def _cloud(realdata_dir: Path) -> np.ndarray[Any, Any]:
    (file,) = (realdata_dir / "lidar").glob("*fp16x5.bin")
    points: np.ndarray[Any, Any] = np.fromfile(file, np.float16).reshape(-1, 5).astype(np.float32)
    return points


@pytest.mark.parametrize(("name", "scheme"), [("01", "int8"), ("01", "mixed"), ("0075", "int8")])
def test_no_head_output_differs(name: str, scheme: str, realdata_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, cap = _settings(name)
    subject: Subject = build(config, "ptq", Scheme.from_file(f"configs/schemes/{scheme}.yaml"))
    subject.network.eval().dense_channels_last()
    features, coords, _ = Voxelizer(config.voxel_size, config.point_cloud_range, 10, cap)(
        _cloud(realdata_dir)
    )
    least, most = NAMES[name]
    assert least < len(coords) <= most
    inputs = (features, torch.cat([coords.new_zeros(len(coords), 1), coords], 1), 1)
    with torch.no_grad(), collecting_ranges(subject.network):
        subject.network(*inputs)
    widen_steps(subject.network)
    check_ranges(subject.network)
    (tmp_path / "source.ckpt").write_bytes(b"stands for a checkpoint, whose hash is taken")
    data = DataSettings(
        voxel_size=config.voxel_size, point_cloud_range=config.point_cloud_range, max_num_voxels_eval=cap
    )
    output = tmp_path / "net.onnx"
    write_deployment("portable", subject, PostProcessing(), data, tmp_path / "source.ckpt", output)
    with torch.inference_mode():
        ours, theirs = subject.network(*inputs), Engine(output)(*inputs)
    num_outputs = num_different = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for branch, tensor in mine.items():
            assert tensor.std() > 0
            num_outputs += tensor.numel()
            num_different += int((tensor != other[branch]).sum())
    geometry = config.geometry
    assert num_outputs == geometry.height * geometry.width * (6 * 10 + 10)
    assert num_different == 0
