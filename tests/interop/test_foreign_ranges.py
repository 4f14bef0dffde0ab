"""Ranges from files that others wrote: names, shapes, and everything that does not match."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn

from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.interop.foreign_ranges import match_ranges, read_ranges
from cpq_train.models import NetworkConfig
from cpq_train.quantization.scheme import Scheme

SMALL = NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_2d_channels=(32, 64),
    upsample_channels=(32, 64),
    head_channels=16,
)
BEV_CONV = "backbone_2d.blocks.0.1"
INPUT, WEIGHT = "._input_quantizer._amax", "._weight_quantizer._amax"


def _state(**changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build(SMALL, "ptq", Scheme.from_dict({"name": "int8", **changes})).network.state_dict()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return _state()


def _theirs(state: dict[str, Tensor]) -> nn.Module:
    """Layers of pytorch-quantization under OpenPCDet's names, calibrated by its own calibrator."""
    weight = state[f"{BEV_CONV}.weight"]
    network = nn.Module()
    network.backbone_2d = nn.Module()
    conv = quant_nn.QuantConv2d(weight.shape[1], weight.shape[0], 3)
    conv.weight = nn.Parameter(weight)
    network.backbone_2d.blocks = nn.ModuleList([nn.Sequential(nn.ZeroPad2d(1), conv)])
    deconv = quant_nn.QuantConvTranspose2d(64, 64, 2, stride=2)
    network.backbone_2d.deblocks = nn.ModuleList([nn.Identity(), nn.Sequential(deconv)])
    quantizers = [m for m in network.modules() if isinstance(m, quant_nn.TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    generator = torch.Generator().manual_seed(1)
    conv(torch.randn(1, weight.shape[1], 8, 8, generator=generator))
    deconv(torch.randn(1, 64, 8, 8, generator=generator))
    for quantizer in quantizers:
        quantizer.load_calib_amax()
    return network


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "model_state", "module."])
def test_files_of_pytorch_quantization(wrapped: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    theirs = _theirs(state).state_dict()
    if wrapped == "module.":
        theirs = {wrapped + name: value for name, value in theirs.items()}
    torch.save(
        theirs if wrapped in ("bare", "module.") else {wrapped: theirs, "epoch": 3}, tmp_path / "f.pth"
    )
    matched = match_ranges(read_ranges(tmp_path / "f.pth"), state)
    theirs = {name.removeprefix("module."): value for name, value in theirs.items()}
    deconv = "backbone_2d.deblocks.1.0"
    assert set(matched.values) == {BEV_CONV + INPUT, BEV_CONV + WEIGHT, deconv + INPUT}
    assert torch.equal(matched.values[BEV_CONV + WEIGHT], state[BEV_CONV + WEIGHT])
    assert matched.values[deconv + INPUT].shape == ()
    assert matched.values[deconv + INPUT] == theirs[deconv + INPUT]
    # Their default for ConvTranspose2d is axis 0, the summed one; of 64 by 64 channels only the shape tells.
    assert len(matched.unused) == 1
    assert "(64, 1, 1, 1), here (1, 64, 1, 1)" in next(iter(matched.unused.values()))
    assert deconv + WEIGHT in matched.missing
    assert not matched.warnings


def test_nvidia_names(state: dict[str, Tensor]) -> None:
    """Scalars in any shape; their add has one quantizer for both inputs, ours takes it for the branch."""
    theirs = {
        "module.backbone.conv_input.0" + INPUT: torch.tensor(3.0),
        "module.backbone.conv1.0.conv1" + INPUT: torch.tensor([1.5]),
        "module.backbone.conv1.0.quant_add" + INPUT: torch.tensor([[2.5]]),
        "module.backbone.conv2.0" + INPUT: torch.tensor(0.5),
        "module.backbone.conv4.4.conv2" + INPUT: torch.tensor(0.75),
        "module.backbone.extra_conv.0" + INPUT: torch.tensor(0.25),
        "module.backbone.extra_conv.0" + WEIGHT: state["backbone_3d.conv_out.0" + WEIGHT],
        "module.backbone.conv9.0" + INPUT: torch.tensor(1.0),
        "module.backbone.conv2.0" + WEIGHT: torch.ones(7, 1, 1, 1, 1),
    }
    matched = match_ranges(theirs, state)
    assert {name: float(value) for name, value in matched.values.items() if name.endswith(INPUT)} == {
        "backbone_3d.conv_input.0" + INPUT: 3.0,
        "backbone_3d.conv1.0.conv1" + INPUT: 1.5,
        "backbone_3d.conv1.0.quant_add" + INPUT: 2.5,
        "backbone_3d.conv2.0.0" + INPUT: 0.5,
        "backbone_3d.conv4.2.conv2" + INPUT: 0.75,
        "backbone_3d.conv_out.0" + INPUT: 0.25,
    }
    assert float(matched.values["backbone_3d.conv1.0.quant_add._residual_quantizer._amax"]) == 1.5
    assert list(matched.unused) == ["module.backbone.conv9.0" + INPUT, "module.backbone.conv2.0" + WEIGHT]
    assert "backbone_3d.conv1.0.conv2" + INPUT in matched.missing
    report = matched.report()
    for name in (*matched.unused, *matched.missing):
        assert name in report


def test_amax_of_the_deconvolution_that_is_a_convolution_there(state: dict[str, Tensor]) -> None:
    amax = torch.arange(1.0, 33.0).view(32, 1, 1, 1)
    state = {**state, "backbone_2d.deblocks.0.0.weight": torch.zeros(48, 32, 1, 1)}
    matched = match_ranges({"neck.deblocks.0.0" + WEIGHT: amax}, state)
    assert torch.equal(matched.values["backbone_2d.deblocks.0.0" + WEIGHT], amax.view(1, 32, 1, 1))


def test_width_and_length_change_places(state: dict[str, Tensor]) -> None:
    amax = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    matched = match_ranges({"bbox_head.tasks.2.dim.3" + WEIGHT: amax}, state)
    assert matched.values["dense_head.heads_list.2.dim.1" + WEIGHT].flatten().tolist() == [2, 1, 3]


def test_shared_quantizer_takes_the_largest_and_says_so(state: dict[str, Tensor]) -> None:
    names = [f"dense_head.heads_list.{i}.hm.0.0" + INPUT for i in range(3)]
    matched = match_ranges(dict(zip(names, torch.tensor([1.0, 4.0, 2.0]), strict=True)), state)
    assert len(matched.values) == 36
    assert {float(value) for value in matched.values.values()} == {4.0}
    assert "stands for 3 that differ" in matched.warnings[0]


@pytest.mark.parametrize(("factor", "num_warnings"), [(1.9, 0), (0.6, 0), (2.1, 1), (0.4, 1)])
def test_weights_of_another_network(factor: float, num_warnings: int, state: dict[str, Tensor]) -> None:
    amax = state[BEV_CONV + WEIGHT].clone()
    amax[3] *= factor
    matched = match_ranges({BEV_CONV + WEIGHT: amax}, state)
    assert len(matched.warnings) == num_warnings
    assert all("in 1 of 32 channels" in warning for warning in matched.warnings)


def test_granularities_that_differ() -> None:
    per_tensor = _state(defaults={"weight": {"granularity": "per_tensor"}})
    matched = match_ranges({BEV_CONV + WEIGHT: torch.ones(32, 1, 1, 1)}, per_tensor)
    assert matched.unused == {BEV_CONV + WEIGHT: "32 values, here 1"}


@pytest.mark.parametrize("content", [{"state_dict": {"a.weight": torch.ones(1)}}, [1, 2], {}])
def test_a_file_without_ranges(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(UserError, match="hold no amax; accepted: a state dict"):
        read_ranges(tmp_path / "f.pth")
