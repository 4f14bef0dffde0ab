"""The emulated engine computes what the network does, but for fp16 and for ties."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import CLOUDS, GRID, features_of, new_subject
from libspconv_files import SCHEMES, with_changed, writable
from torch import Tensor, nn

from cpq_train.arms.subject import Subject
from cpq_train.export.libspconv.reader import read_plan
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.plan import Plan
from cpq_train.quantization.scheme import Scheme

BENCH = Path(__file__).parents[2] / "scripts/bench"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        import libspconv_emulated
    finally:
        sys.path.remove(str(BENCH))
    return libspconv_emulated


@cache
def _subject(scheme: str) -> Subject:
    """A network whose float weights and whose biases are numbers of fp16."""
    subject = new_subject(Scheme.from_dict(SCHEMES[scheme]))
    for module in subject.network.backbone_3d.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.half().float()
            if not hasattr(module, "_weight_quantizer"):
                module.weight.data = module.weight.data.half().float()
    return subject


def _from_file(plan: Plan, folder: Path) -> Plan:
    path = folder / "sparse.onnx"
    path.write_bytes(model_of(plan, "0", "").SerializeToString())
    return read_plan(path)


@torch.no_grad()
def _distance(script: ModuleType, scheme: str, plan: Plan, cloud: str = "some") -> float:
    """Mean difference of the features behind the last layer, in parts of their mean size."""
    coords = CLOUDS[cloud](GRID)
    inputs = features_of(coords).half().float(), nn.functional.pad(coords, (1, 0)), 1
    expected = _subject(scheme).network.backbone_3d(*inputs)
    found = script.Emulation(plan)(*inputs)
    assert found.spatial_shape == expected.spatial_shape
    a, b = (one.features[_order(one.indices)] for one in (found, expected))
    assert a.shape == b.shape
    return float((a - b).abs().sum() / b.abs().sum())


def _order(indices: Tensor) -> list[int]:
    rows = indices.tolist()
    return sorted(range(len(rows)), key=rows.__getitem__)


@pytest.mark.parametrize("cloud", ["one", "borders", "some"])
@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("all but the first", 5e-4), ("per tensor", 5e-4), ("narrow weights", 5e-4), ("float", 2e-3)],
)
def test_the_emulation_is_near_the_network(
    script: ModuleType, scheme: str, bound: float, cloud: str, tmp_path: Path
) -> None:
    """What comes out is rounded to fp16, by up to 2^-11; where all is float so is every layer."""
    assert 0 < _distance(script, scheme, _from_file(writable(_subject(scheme)), tmp_path), cloud) < bound


@pytest.mark.parametrize("scheme", ["nvidia", "float at the end"])
def test_fp16_between_layers_moves_some_codes(script: ModuleType, scheme: str, tmp_path: Path) -> None:
    assert 0 < _distance(script, scheme, _from_file(writable(_subject(scheme)), tmp_path)) < 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"bias": lambda layer: np.zeros_like(layer.bias)},
        {"weight_step": lambda layer: layer.weight_step * np.float32(1.01)},
        {"weight": lambda layer: np.roll(layer.weight, 1, axis=3)},
        {"relu": False},
    ],
)
def test_the_bound_tells_other_numbers(script: ModuleType, change: dict[str, Any]) -> None:
    plan = with_changed(writable(_subject("all but the first")), "backbone_3d.conv2.0.0", **change)
    assert _distance(script, "all but the first", plan) > 0.02


def test_no_voxel(script: ModuleType) -> None:
    network, plan = _subject("nvidia").network, writable(_subject("nvidia"))
    nothing = torch.zeros(0, 5), torch.zeros(0, 4, dtype=torch.int32), 1
    with torch.no_grad():
        found, expected = script.Emulation(plan)(*nothing), network.backbone_3d(*nothing)
    assert found.spatial_shape == expected.spatial_shape
    assert found.features.shape == expected.features.shape == (0, 15)
