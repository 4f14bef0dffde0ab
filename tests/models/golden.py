"""Golden inputs, weights and comparisons that the tests of the network share."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpq_train.common.nuscenes import CLASS_GROUPS
from cpq_train.models import CenterPoint, NetworkConfig, Targets

SMALL_RANGE = (-12.8, -12.8, -5.0, 12.8, 12.8, 3.0)
SMALL = NetworkConfig(point_cloud_range=SMALL_RANGE)
"""The geometry of the golden network."""

NUM_HEADS = len(CLASS_GROUPS)
BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")


def config(**fields: Any) -> NetworkConfig:
    return replace(SMALL, **fields)


def golden_model(golden_dir: Path) -> CenterPoint:
    """The network with the weights of the golden weight rule, loaded strictly."""
    spec = importlib.util.spec_from_file_location("weight_rule", golden_dir / "weight_rule.py")
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    model = CenterPoint(SMALL)
    rule.fill(model)
    return model


def voxels(eval_arrays: Any) -> tuple[Tensor, Tensor, int]:
    features = torch.from_numpy(eval_arrays["voxel_features_mean"])
    return features, torch.from_numpy(eval_arrays["voxel_coords_bzyx"]), 2


def raw_heads(arrays: Any, pattern: str) -> list[dict[str, Tensor]]:
    """Raw head outputs; `pattern` has places for the head and the branch."""
    return [
        {name: torch.from_numpy(arrays[pattern.format(head, name)]) for name in BRANCHES}
        for head in range(NUM_HEADS)
    ]


def golden_targets(arrays: Any, prefix: str = "") -> Targets:
    heatmaps, boxes, indices, masks = (
        [torch.from_numpy(arrays[f"{prefix}{name}{head}"]) for head in range(NUM_HEADS)]
        for name in ("heatmap", "target_boxes", "inds", "mask")
    )
    codes, mask = torch.stack(boxes, 1), torch.stack(masks, 1).bool()
    known = mask[..., None] & ~codes.isnan()
    return Targets(torch.cat(heatmaps, 1), codes, torch.stack(indices, 1), known)


def of_head(targets: Targets, head: int, network: NetworkConfig = SMALL) -> Targets:
    """The targets of one head, as those of a network that has no other."""
    heatmap = targets.heatmap.split([len(group) for group in network.class_groups], dim=1)[head]
    return Targets(heatmap, *(value[:, head : head + 1] for value in targets[1:]))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference relative to the largest magnitude of the expected values."""
    actual, expected = (
        np.asarray(x.detach() if isinstance(x, Tensor) else x, np.float64) for x in (actual, expected)
    )
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))


def assert_targets_equal(got: Targets, wanted: Targets) -> None:
    assert torch.equal(got.mask, wanted.mask)
    assert torch.equal(got.known, wanted.known)
    assert torch.equal(got.indices, wanted.indices)
    torch.testing.assert_close(got.heatmap, wanted.heatmap, rtol=0, atol=1e-7)
    assert torch.equal(got.heatmap == 1, wanted.heatmap == 1)
    torch.testing.assert_close(got.boxes, wanted.boxes, rtol=1e-6, atol=1e-6, equal_nan=True)
