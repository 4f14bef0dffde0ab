"""Targets and losses against the real OpenPCDet code, edge cases included."""

from typing import Any

import numpy as np
import pytest
import torch
from golden import NUM_HEADS, SMALL, assert_targets_equal, config, golden_targets, of_head, raw_heads

from cpq_train.models import assign_targets, center_loss
from cpq_train.models.losses import box_code_error, heatmap_loss
from cpq_train.models.targets import draw_gaussians, gaussian_radius


def test_training_boxes(train_arrays: Any) -> None:
    gt_boxes = torch.from_numpy(train_arrays["gt_boxes_in"])
    actual = assign_targets(gt_boxes, SMALL)
    assert_targets_equal(actual, golden_targets(train_arrays))


def test_edge_cases(target_arrays: Any) -> None:
    gt_boxes = torch.from_numpy(target_arrays["gt_boxes"])
    before = gt_boxes.clone()
    actual = assign_targets(gt_boxes, SMALL, max_objects=gt_boxes.shape[1])
    assert_targets_equal(actual, golden_targets(target_arrays))
    torch.testing.assert_close(gt_boxes, before, rtol=0, atol=0, equal_nan=True)


def test_asymmetric_grid(target_arrays: Any) -> None:
    network = config(point_cloud_range=tuple(target_arrays["asym_range"].tolist()))
    assert (network.geometry.height, network.geometry.width) == (48, 32)
    gt_boxes = torch.from_numpy(target_arrays["asym_gt"])
    actual = assign_targets(gt_boxes, network, max_objects=gt_boxes.shape[1])
    assert_targets_equal(actual, golden_targets(target_arrays, "asym_"))


@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.7])
def test_radius_table(target_arrays: Any, overlap: float) -> None:
    length, width = torch.from_numpy(target_arrays["radius_dims_cells"]).unbind(1)
    expected = target_arrays[f"radius_ov{overlap}"]
    np.testing.assert_allclose(gaussian_radius(length, width, overlap), expected, rtol=5e-6)


@pytest.mark.parametrize("radius", [2, 3, 5, 12])
@pytest.mark.parametrize("place", ["mid", "edges"])
def test_drawn_gaussians(target_arrays: Any, radius: int, place: str) -> None:
    cells = torch.tensor([[4, 7]] if place == "mid" else [[0, 23], [19, 1]])
    heatmap = torch.zeros(1, 1, 24, 20)
    zeros = torch.zeros(len(cells), dtype=torch.int64)
    draw_gaussians(heatmap, zeros, cells, torch.full((len(cells),), float(radius)))
    expected = torch.from_numpy(target_arrays[f"draw_r{radius}_{place}"])
    torch.testing.assert_close(heatmap[0, 0], expected, rtol=0, atol=1e-7)


def test_losses(target_arrays: Any) -> None:
    heads = raw_heads(target_arrays, "pred{}_{}")
    targets = golden_targets(target_arrays)
    losses = center_loss(heads, targets)
    errors, nums_objects = box_code_error(heads, targets)
    for head in range(NUM_HEADS):
        expected = target_arrays[f"hm_loss{head}"].item()
        assert losses[f"hm_loss_head_{head}"].item() == pytest.approx(expected, rel=1e-6)
        # Where OpenPCDet's loss is NaN (a NaN target times 0), the mended one is finite.
        error = errors[head] / nums_objects[head].clamp(min=1)
        per_code = torch.from_numpy(target_arrays[f"reg_loss_per_code{head}"])
        known = ~per_code.isnan()
        torch.testing.assert_close(error[known], per_code[known], rtol=1e-5, atol=1e-6)
        assert bool(error.isfinite().all())
        if bool(known.all()):
            expected = target_arrays[f"loc_loss{head}"].item()
            assert losses[f"loc_loss_head_{head}"].item() == pytest.approx(expected, rel=1e-5)
    assert np.isnan(target_arrays["loc_loss1"])
    assert bool(losses["loss"].isfinite())


def test_unknown_velocity_costs_nothing_and_has_no_gradient(target_arrays: Any) -> None:
    head = {name: value.requires_grad_() for name, value in raw_heads(target_arrays, "pred{}_{}")[1].items()}
    target = of_head(golden_targets(target_arrays), 1)
    known = center_loss([head], target)["loss"]
    target.boxes[..., 8:] = torch.nan
    target.known[..., 8:] = False
    unknown = center_loss([head], target)["loss"]
    assert 0 < unknown.item() < known.item()
    unknown.backward()
    assert head["vel"].grad is not None
    assert head["vel"].grad.abs().max() == 0
    assert head["rot"].grad is not None
    assert head["rot"].grad.abs().max() > 0


def test_focal_loss_without_objects(target_arrays: Any) -> None:
    logits = torch.from_numpy(target_arrays["noobj_logits"])
    loss = heatmap_loss([{"hm": logits}], torch.zeros_like(logits))
    assert loss.divisor == 0
    assert loss.total.item() == pytest.approx(target_arrays["noobj_hm_loss"].item(), rel=1e-6)
