"""Scheme files: rules, overrides, and errors that name what is wrong."""

from pathlib import Path

import pytest
import yaml

from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.prepare import quantizable_layers
from cpq_train.quantization.scheme import KINDS, Scheme

SMALL = NetworkConfig(point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0))
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


@pytest.mark.parametrize("file", sorted(Path("configs/schemes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_schemes_fit_the_network(file: Path) -> None:
    scheme = Scheme.from_file(file)
    assert scheme.name == file.stem
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    layers = quantizable_layers(CenterPoint(SMALL))
    quantized = {k for n, k in layers.items() if not scheme.resolve(layers)[n].is_float}
    only = {"conv2d": {"Conv2d"}, "nvidia": {"SubMConv3d", "SparseConv3d", "ResidualAdd"}}
    assert quantized == only.get(file.stem.split("_")[0], set(layers.values()))


def test_the_axis_is_that_of_the_kind() -> None:
    for compatible, axis in ((False, 1), (True, 0)):
        scheme = Scheme.from_dict({"tensorrt_conv_transpose": compatible})
        layer = scheme.resolve(LAYERS)["backbone_2d.deblocks.1.0"]
        assert layer.weight_axis("ConvTranspose2d") == axis
        assert layer.arithmetic == ("simulated" if compatible else "integer")
        assert "axis 0" in layer.why_simulated or not compatible
        assert scheme.resolve(LAYERS)["backbone_2d.blocks.0.1"].weight_axis("Conv2d") == 0


def test_a_float_layer_says_why() -> None:
    scheme = Scheme.from_dict(
        {"rules": [{"layers": "*", "kinds": ["Conv2d"], "weight": "off", "input": "off"}]}
    )
    assert scheme.resolve(LAYERS)["backbone_2d.blocks.0.1"].why_float == "rule 1 (*)"
    assert scheme.resolve(LAYERS)["backbone_2d.deblocks.1.0"].why_float == ""


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


def test_a_rule_without_kinds_means_all_of_them() -> None:
    """Those too that came after the release that wrote a checkpoint."""
    scheme = Scheme.from_dict({"rules": [{"layers": "*", "weight": {"bits": 4}}]})
    assert scheme.rules[0].kinds == KINDS
    assert "kinds" not in scheme.to_dict()["rules"][0]
    written = {**scheme.to_dict()["rules"][0], "kinds": ["SubMConv3d", "Conv2d"]}
    some = Scheme.from_dict({"rules": [written]})
    assert some.rules[0].kinds == ("SubMConv3d", "Conv2d")
    assert Scheme.from_dict(some.to_dict()) == some


@pytest.mark.parametrize("file", sorted(Path("configs/schemes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_scheme_that_is_cut_short(file: Path, tmp_path: Path) -> None:
    """Cut within a line, or after a key that has lost its value, it is refused."""
    whole = file.read_text()
    for end in range(len(whole)):
        if whole[:end].endswith("\n") and not whole[:end].endswith(":\n"):
            continue
        (tmp_path / "cut.yaml").write_text(whole[:end])
        with pytest.raises(UserError, match=r"cut\.yaml'"):
            Scheme.from_file(tmp_path / "cut.yaml")


def test_a_rule_that_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("rules:\n  - layers: backbone_3d.*\n")
    with pytest.raises(UserError, match=r"s\.yaml', rule 1 sets nothing; accepted: weight, input, bias"):
        Scheme.from_file(tmp_path / "s.yaml")


def test_numbers_of_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("defaults: {input: {method: percentile, percentile: 9.99e1}}\n")
    assert Scheme.from_file(tmp_path / "s.yaml").defaults.input.percentile == 99.9


def test_yaml_off_without_quotes(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("rules:\n  - layers: 'backbone_3d.*'\n    weight: off\n    input: {mode: off}\n")
    assert Scheme.from_file(file).resolve(LAYERS)["backbone_3d.conv_input.0"].is_float


def test_arithmetic() -> None:
    def arithmetic(**defaults: object) -> str:
        scheme = Scheme.from_dict({"defaults": defaults})
        return scheme.resolve(LAYERS)["backbone_2d.blocks.0.1"].arithmetic

    assert arithmetic(input={"bits": 16}, weight={"bits": 16}) == "integer"
    assert arithmetic(input={"mode": "dynamic"}) == "integer"
    assert arithmetic(weight={"format": "fp8_e4m3"}) == "simulated"
    assert arithmetic(weight={"mode": "off"}) == "simulated"
    assert arithmetic(input={"mode": "off"}) == "simulated"


def rule(**settings: object) -> dict[str, object]:
    """A scheme of one rule."""
    return {"rules": [{"layers": "*", **settings}]}


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
        (rule(weight=True), "rule 1, weight: got True, accepted: a mapping, or off"),
        (rule(weight=0), "rule 1, weight: got 0, accepted: a mapping, or off"),
        (rule(input=""), "rule 1, input: got '', accepted: a mapping, or off"),
        (rule(input={"mode": True}), "rule 1, input, mode: got True, accepted: static, dynamic, off"),
        (rule(weight={"bits": 17}), "rule 1, weight, bits: got 17, accepted: whole numbers from 2 to 16"),
        (rule(weight={"bits": True}), "bits: got True, accepted: whole numbers"),
        (rule(weight={"method": "entropy"}), "rule 1, weight, method: got 'entropy', accepted: max, mse$"),
        (rule(weight={"bit": 4}), "rule 1, weight: unknown key 'bit'; accepted: bits, count_zeros"),
        (rule(input={"signed": "false"}), "rule 1, input, signed: got 'false', accepted: true, false"),
        (rule(weight={"signed": False}), r"signed: got False, accepted: true \(weights have both signs\)"),
        (rule(input={"percentile": "99.9"}), "percentile: got '99.9', accepted: above 0, up to 100"),
        (rule(input={"percentile": 0}), "percentile: got 0, accepted: above 0, up to 100"),
        (rule(kinds="Conv2d"), "rule 1, kinds: got 'Conv2d', accepted: a list of SubMConv3d"),
        (rule(kinds=None), "rule 1, kinds: got None, accepted: a list of SubMConv3d"),
        (rule(layers=3), "rule 1, layers: got 3, accepted: a text"),
        (rule(layer="*"), "rule 1: unknown key 'layer'; accepted: bias, input, kinds, layers, weight"),
        (rule(input={"format": "fp8_e4m3", "bits": 4}), "rule 1, input: format fp8_e4m3 has 8 bits, signed"),
        (
            {"defaults": {"input": {"format": "fp8_e4m3"}}, **rule(input={"bits": 4})},
            "scheme 'unnamed', rule 1, input: format fp8_e4m3 has 8 bits",
        ),
        ({"rules": ["*"]}, "rule 1: got '\\*', accepted: a mapping"),
        ({"rules": 0}, "scheme, rules: got 0, accepted: a list"),
        ({"rules": None}, "scheme, rules: got None, accepted: a list"),
        ({"defaults": None}, "scheme, defaults: got None, accepted: a mapping"),
        (
            {"defaults": {"weights": {}}},
            "scheme, defaults: unknown key 'weights'; accepted: bias, input, weight",
        ),
        ({"share_residual": "false"}, "share_residual: got 'false', accepted: true, false"),
        ({"tensorrt_conv_transpose": 1}, "tensorrt_conv_transpose: got 1, accepted: true, false"),
        ({"on_unfit_range": False}, "on_unfit_range: got False, accepted: error, float"),
        ({"name": None}, "scheme, name: got None, accepted: a text"),
        ({1: 2}, "unknown key 1; accepted: defaults"),
        (
            {"default": {}},
            "unknown key 'default'; accepted: defaults, name, on_reuse, on_small_step, on_unfit_range, rules",
        ),
        ({"rules": [{"weight": "off"}]}, "rule 1: needs 'layers'"),
        ({"rules": [{"layers": "*", "kinds": ["LSTM"]}]}, "got 'LSTM', accepted: SubMConv3d"),
        (["int8"], r"scheme: got \['int8'\], accepted: a mapping"),
    ],
)
def test_errors(content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scheme.from_dict(content).resolve(LAYERS)


def test_missing_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Scheme.from_file(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match="is no YAML"):
        Scheme.from_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize("file", sorted(Path("configs/schemes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_scheme_says_which_bias_it_has(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["defaults"]["bias"] == Scheme.from_file(file).defaults.bias
