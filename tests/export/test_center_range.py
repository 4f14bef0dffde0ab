"""The center range that follows the range of points is what every file of a run says."""

from dataclasses import replace
from pathlib import Path

import torch
from exported_networks import SMALL, float_network, new_subject, scheme_of, write
from old_files import CHECKPOINTS

from cpq_train.models import NetworkConfig
from cpq_train.models.decode import PostProcessing
from cpq_train.training.detector import CenterPointDetector

PUBLISHED = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)


def test_settings_hold_the_range_that_is_used() -> None:
    wide = NetworkConfig(point_cloud_range=(-102.4, -102.4, -5.0, 102.4, 102.4, 3.0))
    detector = CenterPointDetector(wide)
    assert detector.post_processing.center_range == (-102.4, -102.4, -10.0, 102.4, 102.4, 10.0)
    assert detector.hparams["post_processing"]["center_range"] == detector.post_processing.center_range
    assert CenterPointDetector().hparams["post_processing"]["center_range"] == PUBLISHED
    explicit = CenterPointDetector(wide, post_processing=PostProcessing(center_range=PUBLISHED))
    assert explicit.hparams["post_processing"]["center_range"] == PUBLISHED


def test_a_checkpoint_keeps_the_range_it_was_made_with(tmp_path: Path) -> None:
    """One of a wide network from before the range followed."""
    content = torch.load(CHECKPOINTS["float"], weights_only=True)
    network = content["hyper_parameters"]["network"]
    low, high = network["point_cloud_range"][2::3]
    network["point_cloud_range"] = (-81.92, -81.92, low, 81.92, 81.92, high)
    torch.save(content, tmp_path / "wide.ckpt")
    detector = CenterPointDetector.load_from_checkpoint(tmp_path / "wide.ckpt")
    assert detector.network_config.point_cloud_range[0] == -81.92
    assert detector.post_processing.center_range == PUBLISHED


def test_a_sidecar_says_the_range(tmp_path: Path) -> None:
    wide = replace(SMALL, point_cloud_range=(-1.6, -70.4, -5.0, 1.6, 70.4, 3.0))
    _, sidecar = write(new_subject(scheme_of("int8"), float_network(wide)), tmp_path)
    assert sidecar.post_processing["center_range"] == (-61.2, -70.4, -10.0, 61.2, 70.4, 10.0)
