"""Unfit ranges: found, told in a table, and what the scheme has done about them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cpq_train.arms.loading import from_weights
from cpq_train.arms.state import check_state
from cpq_train.arms.structure import build
from cpq_train.arms.subject import Subject
from cpq_train.common.errors import UserError
from cpq_train.models import NetworkConfig
from cpq_train.quantization.coverage import coverage_of
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.prepare import leave_in_float
from cpq_train.quantization.ranges.calibration import check_ranges, collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme

SMALL = NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_2d_channels=(16, 32),
    upsample_channels=(16, 16),
    head_channels=16,
)
UNSIGNED = QuantizerScheme(signed=False)
PER_CHANNEL = QuantizerScheme(granularity="per_channel")
DEBLOCK = "backbone_2d.deblocks.1.0._weight_quantizer"
SHARED = "dense_head.heads_list.3.dim.0.0._input_quantizer"


def _voxels() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    coords = torch.stack([torch.randint(0, n, (300,), generator=generator) for n in (1, 40, 128, 128)], 1)
    coords = torch.unique(coords, dim=0).int()
    return torch.randn(len(coords), 5, generator=generator), coords, 1


def _calibrated() -> Subject:
    subject = build(SMALL, "ptq", Scheme.from_file("configs/schemes/int8.yaml"))
    with collecting_ranges(subject.network):
        subject.network(*_voxels())
    return subject


@pytest.fixture(scope="module")
def calibrated() -> Subject:
    return _calibrated()


def _rows(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    return [" ".join(line.split()) for line in str(error.value).splitlines()[2:]]


def test_every_problem_has_a_row(calibrated: Subject) -> None:
    state = {name: tensor.clone() for name, tensor in calibrated.network.state_dict().items()}
    check_state(calibrated.network, state, "x.ckpt")
    conv = "backbone_3d.conv1.0.conv1._weight_quantizer"
    first = "backbone_2d.blocks.0.1._input_quantizer"
    add = "backbone_3d.conv1.0.quant_add._input_quantizer"
    del state[SHARED + "._amax"]
    state[DEBLOCK + "._amax"] = state[DEBLOCK + "._amax"].reshape(16, 1, 1, 1)
    state[conv + "._amax"][:3] = torch.nan
    state[conv + "._amax"][5] = -1.0
    state[conv + "._amax"][6:8] = 0.0  # all-zero channels are fine
    state[first + "._amax"] = torch.tensor(torch.inf)
    state[add + "._amax"] = torch.tensor(0.0)
    with pytest.raises(UserError, match=r"^checkpoint 'x.ckpt': 5 quantizers have no usable amax:") as error:
        check_state(calibrated.network, state, "x.ckpt")
    assert sorted(_rows(error)) == sorted(
        [
            f"{SHARED} Conv2d missing 1 of 1",
            f"{DEBLOCK} ConvTranspose2d wrong axis: per channel of axis 0 instead of per channel of axis 1, "
            "(16, 1, 1, 1) instead of (1, 16, 1, 1) 16 of 16",
            f"{conv} SubMConv3d NaN: never calibrated, or lost 3 of 16",
            f"{conv} SubMConv3d negative 1 of 16",
            f"{first} Conv2d infinite 1 of 1",
            f"{add} ResidualAdd zero 1 of 1",
        ]
    )


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((8, 1, 1, 1), "wrong axis"), ((), "per tensor instead of per channel"), ((1, 8, 1, 1), "wrong shape")],
)
def test_shapes(calibrated: Subject, shape: tuple[int, ...], problem: str) -> None:
    state = dict(calibrated.network.state_dict())
    state[DEBLOCK + "._amax"] = torch.ones(shape)
    with pytest.raises(UserError, match=problem):
        check_state(calibrated.network, state, "x.ckpt")


def test_another_architecture_is_still_told_first(calibrated: Subject) -> None:
    state = dict(calibrated.network.state_dict())
    del state["backbone_2d.blocks.0.1.weight"], state[SHARED + "._amax"]
    with pytest.raises(UserError, match=r"another architecture than model.network: 1 missing \(backbone_2d"):
        check_state(calibrated.network, state, "x.ckpt")


def _conv(scheme: QuantizerScheme, weight: float = 1.0) -> nn.Conv2d:
    layer = nn.Sequential(nn.Conv2d(1, 2, 1))
    nn.init.constant_(layer[0].weight, weight)
    quantize_layer(layer[0], LayerScheme(PER_CHANNEL, scheme))
    return layer


@pytest.mark.parametrize(
    ("scheme", "value", "problem"),
    [
        (QuantizerScheme(), torch.nan, "NaN in the tensors it saw some of 2"),
        (QuantizerScheme(method="mse"), torch.inf, "infinite values in the tensors it saw some of 2"),
        (UNSIGNED, -2.0, "an unsigned quantizer clips them: use signed: true 1 of 2"),
    ],
)
def test_unfit_after_calibration(scheme: QuantizerScheme, value: float, problem: str) -> None:
    layer = _conv(scheme)
    with pytest.raises(UserError) as error, collecting_ranges(layer):
        layer(torch.tensor([1.0, value]).view(1, 1, 2, 1))
    (row,) = _rows(error)
    assert row.startswith("0._input_quantizer Conv2d ")
    assert row.endswith(problem)


def test_channels_of_zero_weights_are_counted() -> None:
    layer = _conv(UNSIGNED, weight=0.0)
    with collecting_ranges(layer):
        layer(torch.ones(1, 1, 2, 2))
    assert check_ranges(layer) == 2
    assert layer[0]._weight_quantizer(torch.ones(2, 1, 1, 1)).count_nonzero() == 0


def test_an_error_inside_leaves_the_ranges_alone() -> None:
    layer = _conv(QuantizerScheme())
    with pytest.raises(RuntimeError), collecting_ranges(layer):
        layer(torch.ones(1, 2, 2, 2))  # one channel too many
    assert layer[0]._input_quantizer.amax.isnan()
    assert layer[0]._input_quantizer.is_active


def _unsigned_at(layers: str) -> Scheme:
    content = Scheme.from_file("configs/schemes/int8.yaml").to_dict()
    content["on_unfit_range"] = "float"
    content["rules"].append({"layers": layers, "input": {"signed": False}})
    return Scheme.from_dict(content)


def _leaver(subject: Subject) -> Callable[..., None]:
    def leave(problems: list) -> None:
        subject.scheme = leave_in_float(subject.network, problems)
        subject.calibration = {"left_in_float": subject.prepared.left_in_float}

    return leave


def test_unfit_layers_left_in_float_survive_a_checkpoint(tmp_path: Path) -> None:
    """The add's branch is signed, and the whole first block reads one unsigned tensor of a bad range."""
    asked = _unsigned_at("backbone_3d.conv1.*")
    subject = build(SMALL, "ptq", asked)
    shared = subject.network.backbone_3d.conv1[0].conv1._input_quantizer
    with collecting_ranges(subject.network, _leaver(subject)):
        subject.network(*_voxels())
        shared._calibrator.collect(torch.tensor([-1.0]))
    names = subject.calibration["left_in_float"]
    assert {"backbone_3d.conv1.0.conv1", "backbone_3d.conv1.0.quant_add"} <= set(names)
    assert all(name.startswith("backbone_3d.conv1.") for name in names)
    assert coverage_of(subject.prepared).counts["Conv2d"] == (85, 85)
    assert all(subject.prepared.schemes[name].is_float for name in names)
    rows = subject.describe()["layers"]
    assert rows["backbone_3d.conv1.0.conv1"]["arithmetic"] == "float"
    assert rows["backbone_3d.conv1.0.conv1"]["shares_input_with"] is None
    path = tmp_path / "ptq.ckpt"
    state = {f"network.{name}": tensor for name, tensor in subject.network.state_dict().items()}
    torch.save({"state_dict": state, "quantization": subject.describe()}, path)
    again = from_weights(SMALL, path, None, asked)
    assert again.describe() == subject.describe()
    for a, b in zip(again.network.eval()(*_voxels()), subject.network.eval()(*_voxels()), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_nothing_left_quantized_is_an_error() -> None:
    subject = build(SMALL, "ptq", Scheme.from_dict({"on_unfit_range": "float"}))
    with (
        pytest.raises(UserError, match=r"leaves all .* layers in float"),
        collecting_ranges(subject.network, _leaver(subject)),
    ):
        pass


def test_unfit_weights_are_an_error_all_the_same() -> None:
    subject = build(SMALL, "ptq", _unsigned_at("backbone_3d.conv1.*"))
    subject.network.backbone_2d.blocks[0][1]._weight_quantizer._amax.fill_(torch.nan)
    with (
        pytest.raises(UserError, match="1 quantizers have no usable amax"),
        collecting_ranges(subject.network, _leaver(subject)),
    ):
        subject.network(*_voxels())
