"""Scheme files: rules, overrides, and errors that name what is wrong."""

from pathlib import Path

import pytest

from cpq_train.errors import UserError
from cpq_train.quantization.scheme import Scheme

LAYERS = {
    "backbone_3d.conv_input.0": "SubMConv3d",
    "backbone_3d.conv1.0.quant_add": "ResidualAdd",
    "backbone_2d.blocks.0.1": "Conv2d",
    "backbone_2d.deblocks.1.0": "ConvTranspose2d",
}


def test_shipped_scheme() -> None:
    scheme = Scheme.from_file("configs/schemes/int8.yaml")
    resolved = scheme.resolve(LAYERS)
    assert resolved["backbone_3d.conv_input.0"].is_float
    assert resolved["backbone_2d.blocks.0.1"].weight.granularity == "per_channel"
    assert resolved["backbone_2d.blocks.0.1"].arithmetic == "integer"
    assert resolved["backbone_3d.conv1.0.quant_add"].weight.is_off
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_later_rules_win_and_kinds_restrict() -> None:
    scheme = Scheme.from_dict(
        {
            "rules": [
                {"layers": "*", "weight": "off", "input": "off"},
                {"layers": "*", "kinds": ["Conv2d"], "weight": {"mode": "static", "bits": 4}},
                {"layers": "*blocks.0*", "input": {"mode": "dynamic", "bits": 6}},
            ]
        }
    )
    resolved = scheme.resolve(LAYERS)
    conv = resolved["backbone_2d.blocks.0.1"]
    assert (conv.weight.bits, conv.weight.mode, conv.input.bits, conv.input.mode) == (
        4,
        "static",
        6,
        "dynamic",
    )
    assert resolved["backbone_2d.deblocks.1.0"].is_float


def test_yaml_off_without_quotes(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("rules:\n  - layers: 'backbone_3d.*'\n    weight: off\n    input: {mode: off}\n")
    assert Scheme.from_file(file).resolve(LAYERS)["backbone_3d.conv_input.0"].is_float


def test_wide_codes_are_simulated() -> None:
    scheme = Scheme.from_dict({"defaults": {"input": {"bits": 16}}})
    assert scheme.resolve(LAYERS)["backbone_2d.blocks.0.1"].arithmetic == "simulated"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rules": [{"layers": "neck.*"}]}, "rule 1: layers 'neck.*'.*matches no layer"),
        ({"defaults": {"weight": {"bits": 1}}}, "bits: got 1, accepted: whole numbers from 2 to 16"),
        (
            {"defaults": {"input": {"method": "median"}}},
            "got 'median', accepted: max, percentile, mse, entropy",
        ),
        ({"defaults": {"input": {"granularity": "per_channel"}}}, "got 'per_channel', accepted: per_tensor"),
        ({"defaults": {"input": {"mode": "sometimes"}}}, "got 'sometimes', accepted: static, dynamic, off"),
        ({"default": {}}, "unknown key 'default'; accepted: defaults, name, rules, share_residual"),
        ({"rules": [{"weight": "off"}]}, "rule 1: needs 'layers'"),
        ({"rules": [{"layers": "*", "kinds": ["Linear"]}]}, "got 'Linear', accepted: SubMConv3d"),
        (["int8"], "expected a mapping, got"),
    ],
)
def test_errors(content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scheme.from_dict(content).resolve(LAYERS)


def test_missing_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Scheme.from_file(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        Scheme.from_file(tmp_path / "bad.yaml")
