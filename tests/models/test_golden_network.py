"""The network against the outputs of the real OpenPCDet code. Tolerances: the README of the golden data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import BRANCHES, NUM_HEADS, SMALL, golden_model, relative_error, voxels
from torch import Tensor

from cpq_train.models import assign_targets, center_loss
from cpq_train.sparse import SparseConvTensor

EVAL, TRAIN = 1e-4, 1e-4


def by_coordinate(x: SparseConvTensor) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and features in lexicographic order of batch, z, y, x."""
    coords = x.indices.numpy()
    order = np.lexsort(coords.T[::-1])
    return coords[order], x.features.detach().numpy()[order]


@pytest.fixture(scope="module")
def stages(golden_dir: Path, eval_arrays: Any) -> dict[str, Any]:
    """Outputs of every stage in eval mode."""
    model = golden_model(golden_dir).eval()
    seen: dict[str, Any] = {}
    names = [f"backbone_3d.conv{n}" for n in (1, 2, 3, 4)] + ["backbone_3d.conv_out", "map_to_bev_module"]
    for name in [*names, "backbone_2d", "dense_head.shared_conv"]:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out})
        )
    with torch.no_grad():
        seen["heads"] = model(*voxels(eval_arrays))
    return seen


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_sparse_stage(stages: dict[str, Any], eval_arrays: Any, stage: int) -> None:
    coords, features = by_coordinate(stages[f"backbone_3d.conv{stage}"])
    np.testing.assert_array_equal(coords, eval_arrays[f"x_conv{stage}_indices_sorted"])
    assert relative_error(features[::4], eval_arrays[f"x_conv{stage}_features_sorted_every4"]) < EVAL
    assert relative_error(features.sum(0, dtype=np.float64), eval_arrays[f"x_conv{stage}_colsum64"]) < EVAL


def test_sparse_output(stages: dict[str, Any], eval_arrays: Any) -> None:
    coords, features = by_coordinate(stages["backbone_3d.conv_out"])
    np.testing.assert_array_equal(coords, eval_arrays["out_indices_sorted"])
    assert relative_error(features, eval_arrays["out_features_sorted"]) < EVAL
    assert stages["backbone_3d.conv_out"].spatial_shape == [2, 32, 32]


def test_bev_maps(stages: dict[str, Any], eval_arrays: Any) -> None:
    bev: Tensor = stages["map_to_bev_module"]
    assert relative_error(bev[:, ::8], eval_arrays["bev_ch_every8"]) < EVAL
    assert relative_error(bev.double().sum((2, 3)), eval_arrays["bev_chan_sum64"]) < EVAL
    features: Tensor = stages["backbone_2d"]
    assert relative_error(features[:, ::4], eval_arrays["feat2d_ch_every4"]) < EVAL
    assert relative_error(features.double().sum((2, 3)), eval_arrays["feat2d_chan_sum64"]) < EVAL
    assert relative_error(stages["dense_head.shared_conv"], eval_arrays["shared_conv_out"]) < EVAL


@pytest.mark.parametrize("head", range(NUM_HEADS))
def test_heads_in_eval(stages: dict[str, Any], eval_arrays: Any, head: int) -> None:
    for name in BRANCHES:
        assert relative_error(stages["heads"][head][name], eval_arrays[f"head{head}_{name}"]) < EVAL, name


def training_step(
    golden_dir: Path, eval_arrays: Any, train_arrays: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """Forward, loss, backward."""
    model = golden_model(golden_dir).to(dtype).train()
    features, coords, batch_size = voxels(eval_arrays)
    heads = model(features.to(dtype), coords, batch_size)
    gt_boxes = torch.from_numpy(train_arrays["gt_boxes_in"])
    losses = center_loss(heads, assign_targets(gt_boxes, SMALL))
    losses["loss"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"model": model, "heads": heads, "losses": losses, "grads": grads}


@pytest.fixture(scope="module")
def step(golden_dir: Path, eval_arrays: Any, train_arrays: Any) -> dict[str, Any]:
    return training_step(golden_dir, eval_arrays, train_arrays, torch.float32)


@pytest.fixture(scope="module")
def exact_step(golden_dir: Path, eval_arrays: Any, train_arrays: Any) -> dict[str, Any]:
    """In float64: of the two runs compared, only the golden one then has signs flipped by rounding."""
    return training_step(golden_dir, eval_arrays, train_arrays, torch.float64)


def test_heads_in_training(step: dict[str, Any], train_arrays: Any) -> None:
    for head in range(NUM_HEADS):
        for name in BRANCHES:
            error = relative_error(step["heads"][head][name], train_arrays[f"train_head{head}_{name}"])
            assert error < TRAIN, (head, name)


def test_losses_of_the_step(step: dict[str, Any], train_arrays: Any) -> None:
    losses = {name: value.item() for name, value in step["losses"].items()}
    for head in range(NUM_HEADS):
        assert losses[f"hm_loss_head_{head}"] == pytest.approx(train_arrays[f"hm_loss_head{head}"], rel=1e-5)
        assert losses[f"loc_loss_head_{head}"] == pytest.approx(
            train_arrays[f"loc_loss_head{head}"], rel=1e-5
        )
    assert losses["loss"] == pytest.approx(train_arrays["total_loss"].item(), rel=1e-5)


def test_gradient_norms(step: dict[str, Any], exact_step: dict[str, Any], train_arrays: Any) -> None:
    assert set(step["grads"]) == set(train_arrays["grad_names"])
    for name, norm in zip(train_arrays["grad_names"], train_arrays["grad_l2"], strict=True):
        actual, exact = step["grads"][name].norm().item(), exact_step["grads"][name].norm().item()
        if norm < 1e-3:  # a bias in front of BatchNorm has no gradient but rounding
            assert max(actual, exact) < 1e-3, name
        else:
            assert actual == pytest.approx(norm, rel=2e-2), name
            assert exact == pytest.approx(norm, rel=2e-3), name


def test_full_gradients(exact_step: dict[str, Any], train_arrays: Any) -> None:
    names = [key.removeprefix("grad::") for key in train_arrays.files if key.startswith("grad::")]
    assert len(names) == 13
    for name in names:
        expected = train_arrays[f"grad::{name}"]
        if np.abs(expected).max() > 2e-5:
            tolerance = 1e-4 if name.startswith("dense_head.heads_list") else 2e-2
            assert relative_error(exact_step["grads"][name], expected) < tolerance, name


def test_batchnorm_statistics_of_the_step(step: dict[str, Any], train_arrays: Any) -> None:
    state = step["model"].state_dict()
    keys = [key for key in train_arrays.files if key.startswith("after1step::")]
    assert len(keys) == 15
    for key in keys:
        assert relative_error(state[key.removeprefix("after1step::")], train_arrays[key]) < 1e-5, key
