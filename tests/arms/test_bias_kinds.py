"""Kinds of biases on the road of a checkpoint: said, loaded, compared, folded, improved, trained."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import fails
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from old_files import CHECKPOINTS, as_said_today, small_options
from tiny_fit import Fit, run
from torch import Tensor, nn

from cpq_train.arms.calibration import calibrate
from cpq_train.arms.loading import fold_checkpoint, from_weights, load
from cpq_train.arms.scheme_difference import scheme_difference
from cpq_train.arms.snapped_biases import snap_biases
from cpq_train.arms.starting_point import CalibrationConfig
from cpq_train.arms.structure import restructure
from cpq_train.arms.subject import Subject
from cpq_train.common.errors import UserError
from cpq_train.export.plan import Convolution
from cpq_train.export.planning import plan_of
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.numerics.biases import LARGEST_BIAS_CODE
from cpq_train.quantization.ranges.bias_steps import bias_problems
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantized_layers
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

INT8 = "configs/schemes/int8.yaml"
QUANTIZED = ("ptq", "qat", "learned")


def _config(name: str) -> NetworkConfig:
    return NetworkConfig(**torch.load(CHECKPOINTS[name], weights_only=True)["hyper_parameters"]["network"])


def _old(name: str) -> Subject:
    return load(_config(name), CHECKPOINTS[name])


def _voxels(network: CenterPoint, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    grid = network.backbone_3d.sparse_shape
    cells = [torch.randint(0, min(size, 40), (2000,), generator=generator) for size in grid]
    coords = nn.functional.pad(torch.unique(torch.stack(cells, 1), dim=0), (1, 0)).int()
    scale = torch.tensor([20.0, 20.0, 1.0, 60.0, 0.2])
    return torch.randn(len(coords), 5, generator=generator) * scale, coords, 1


@torch.no_grad()
def _outputs(network: CenterPoint) -> list[Tensor]:
    heads = network.eval()(*_voxels(network))
    return [tensor for head in heads for tensor in head.values()]


def _kinds(network: nn.Module) -> dict[str, str]:
    layers = quantized_layers(network)
    return {name: one.bias_kind for name, one in layers.items() if isinstance(one, QuantizedConvolution)}


def _scheme(bias: str = "accumulator", **more: Any) -> Scheme:
    content = {**yaml.safe_load(Path(INT8).read_text()), "on_small_step": "error", **more}
    return Scheme.from_dict({**content, "defaults": {**content["defaults"], "bias": bias}})


# Old checkpoints


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_old_checkpoint_has_float_biases(name: str, tmp_path: Path) -> None:
    """It does not say so; one that does has the same outputs bit for bit, one of other biases has others."""
    content = torch.load(CHECKPOINTS[name], weights_only=True)
    said = content["quantization"]
    assert "bias" not in said["scheme"]["defaults"]
    assert not any("bias" in row for row in said["layers"].values())
    subject = _old(name)
    assert set(_kinds(subject.network).values()) == {"float"}
    torch.save({**content, "quantization": as_said_today(said)}, tmp_path / "said.ckpt")
    outputs = _outputs(subject.network)
    explicit = _outputs(load(_config(name), tmp_path / "said.ckpt").network)
    assert all(torch.equal(one, other) for one, other in zip(outputs, explicit, strict=True))
    assert len(snap_biases(subject, {"*": "accumulator"})) == 43
    others = _outputs(subject.network)
    assert not all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))
    for one, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(one.abs().max()))


# Descriptions


def test_rows_of_layers_say_their_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = ({"layers": "backbone_3d.*", "bias": "fp16"}, {"layers": "*.hm.*", "bias": "float"})
    content = _scheme().to_dict()
    scheme = Scheme.from_dict({**content, "rules": [*content["rules"], *rules]})
    subject = from_weights(_config("float"), CHECKPOINTS["float"], "ptq", scheme)
    rows = subject.describe()["layers"]
    found = {name: row["bias"] for name, row in rows.items()}
    kinds = _kinds(subject.network)
    assert {name: found[name] for name in kinds} == kinds
    assert set(kinds.values()) == {"float", "accumulator", "fp16"}
    assert {found[name] for name in found.keys() - kinds.keys()} == {"float"}
    assert found["backbone_3d.conv_input.0"] == "float"  # no integer sum stands behind it
    assert rows["backbone_3d.conv1.0.quant_add"]["bias"] == "float"
    old = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    torch.save({**old, "quantization": subject.describe()}, tmp_path / "said.ckpt")
    assert load(_config("ptq"), tmp_path / "said.ckpt").describe() == subject.describe()
    main(["describe", str(tmp_path / "said.ckpt")])
    out = capsys.readouterr().out
    assert all(kind in out for kind in ("accumulator", "fp16"))


@pytest.mark.parametrize("value", ["int32", 3, None])
def test_a_row_with_another_bias(value: Any, tmp_path: Path) -> None:
    """Rows are for readers: the scheme says what a network is."""
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    next(iter(content["quantization"]["layers"].values()))["bias"] = value
    torch.save(content, tmp_path / "odd.ckpt")
    if isinstance(value, str):
        assert set(_kinds(load(_config("ptq"), tmp_path / "odd.ckpt").network).values()) == {"float"}
    else:
        with pytest.raises(UserError, match=r"odd\.ckpt', quantization, layers, .*, bias: "):
            load(_config("ptq"), tmp_path / "odd.ckpt")


# Differences


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bias": "accumulator"}, "defaults.bias: checkpoint float, model.scheme accumulator"),
        ({"bias": "fp16"}, "defaults.bias: checkpoint float, model.scheme fp16"),
        ({"bias": "float", "on_small_step": "widen"}, "on_small_step: checkpoint error, model.scheme widen"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], line: str) -> None:
    before = _old("ptq").scheme
    assert before is not None
    assert scheme_difference(_scheme("float"), before, None) == ""
    assert scheme_difference(_scheme(**change), before, None).splitlines() == [
        f"  {line}",
        "  to go on as the checkpoint is: --model.scheme null",
    ]


def test_a_difference_of_a_rule_is_named() -> None:
    subject = _old("ptq")
    snap_biases(subject, {"backbone_2d.*": "accumulator"})
    assert subject.scheme is not None
    found = scheme_difference(_scheme("float"), subject.scheme, None)
    assert "  rules.2.layers: checkpoint backbone_2d.*, model.scheme none\n" in found
    assert "  rules.2.bias: checkpoint accumulator, model.scheme none\n" in found
    assert "rules.1" not in found


def test_a_fit_with_other_biases_is_refused_and_says_what_to_type(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a ptq checkpoint of float biases, with a scheme of others."""
    options = ["fit", *small_options(simulated_root, tmp_path / "run")]
    options += ["--model.arm", "qat", "--model.weights", str(CHECKPOINTS["ptq"])]
    error = fails([*options, "--model.scheme", INT8], capsys)
    assert f"'{CHECKPOINTS['ptq']}' was calibrated with another scheme: " in error
    assert "defaults.bias: checkpoint float, model.scheme accumulator" in error
    assert error.endswith("to go on as the checkpoint is: --model.scheme null")
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    goes_on = from_weights(_config("ptq"), CHECKPOINTS["ptq"], "qat", None)
    assert set(_kinds(goes_on.network).values()) == {"float"}


# BatchNorm


def _kept(batchnorm: BatchNormPolicy, scheme: Scheme, folder: Path, dead: bool = False) -> Path:
    """A qat checkpoint whose BatchNorm is there still."""
    subject = from_weights(_config("float"), CHECKPOINTS["float"], "qat", scheme, batchnorm)
    torch.manual_seed(0)
    for module in subject.network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.3, 0.5)
            if dead:
                module.weight.data[1] = 1e-6
    with collecting_ranges(subject.network.eval()):
        subject.network(*_voxels(subject.network, 1))
    state = {f"network.{name}": value for name, value in subject.network.state_dict().items()}
    own = torch.load(CHECKPOINTS["qat"], weights_only=True)
    torch.save({**own, "state_dict": state, "quantization": subject.describe()}, folder / "kept.ckpt")
    return folder / "kept.ckpt"


def _folded(path: Path) -> Subject:
    fold_checkpoint(_config("float"), path, path.with_name("folded.ckpt"))
    return load(_config("float"), path.with_name("folded.ckpt"))


@pytest.mark.parametrize("batchnorm", ["frozen", "trained"])
def test_batchnorm_folded_behind_training_gives_whole_biases(batchnorm: Any, tmp_path: Path) -> None:
    path = _kept(batchnorm, _scheme(), tmp_path)
    before, after = load(_config("float"), path), _folded(path)
    assert after.batchnorm == "folded"
    assert set(_kinds(after.network).values()) == {"accumulator"}
    plan = plan_of(after.network)
    whole = [o.bias for o in plan.operations if isinstance(o, Convolution) and o.input_range is not None]
    assert len(whole) == 43
    assert all(bias is not None and bias.dtype.name == "int32" for bias in whole)
    for report in verify_layers(after.network, _voxels(after.network)):
        assert report.num_mismatched == 0, report
    for one, other in zip(_outputs(before.network), _outputs(after.network), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(one.abs().max()))


def test_steps_that_the_fold_makes_too_small_are_widened_where_the_scheme_says_so(tmp_path: Path) -> None:
    """The fold multiplies a channel's weights by next to nothing and gives it its first bias."""
    after = _folded(_kept("trained", _scheme(on_small_step="widen"), tmp_path, dead=True))
    assert bias_problems(after.network) == []
    for report in verify_layers(after.network, _voxels(after.network)):
        assert report.num_mismatched == 0, report


def test_steps_that_the_fold_makes_too_small_are_refused_where_the_checkpoint_is_loaded(
    tmp_path: Path,
) -> None:
    said = r"checkpoint '.*': \d+ layers cannot hold their bias:(.|\n)*too small for the bias; .* channels 1"
    with pytest.raises(UserError, match=said):
        _folded(_kept("trained", _scheme(), tmp_path, dead=True))


# Better starting points


@pytest.fixture(scope="module")
def calibrated(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PTQ checkpoints of 4-bit weights and whole biases: plain, and with all that calibration can do."""
    folder = tmp_path_factory.mktemp("calibrated")
    scheme = {"defaults": {"weight": {"bits": 4}, "bias": "accumulator"}, "on_small_step": "widen"}
    (folder / "w4.yaml").write_text(yaml.safe_dump(scheme))
    options = ["calibrate", *small_options(simulated_root, folder / "run")]
    options += ["--model.weights", str(CHECKPOINTS["float"]), "--model.scheme", str(folder / "w4.yaml")]
    options += ["--data.num_calibration_samples", "3", "--model.calibration.num_batches", "2"]
    more = ["--model.calibration.bias_correction", "true", "--model.calibration.adaround_num_steps", "5"]
    main([*options, "--output", str(folder / "plain.ckpt")])
    main([*options, *more, "--output", str(folder / "improved.ckpt")])
    return {name: folder / f"{name}.ckpt" for name in ("plain", "improved")}


def test_adaround_and_bias_correction_leave_whole_biases(calibrated: dict[str, Path], tmp_path: Path) -> None:
    plain, improved = (torch.load(path, weights_only=True)["state_dict"] for path in calibrated.values())
    changed = [name for name, value in plain.items() if not torch.equal(value, improved[name])]
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    subject = load(_config("float"), calibrated["improved"])
    assert set(_kinds(subject.network).values()) == {"accumulator"}
    assert bias_problems(subject.network) == []
    file = tmp_path / "net.onnx"
    main(["export", str(calibrated["improved"]), "--output", str(file), "--target", "portable-fast"])
    main(["verify", str(calibrated["improved"]), "--engine", str(file), "--num_sweeps", "2"])


# Training


def test_learned_ranges_train_with_whole_biases(tmp_path: Path) -> None:
    """`tiny_fit` trains with int8.yaml, whose biases are whole."""
    assert Scheme.from_file(INT8).defaults.bias == "accumulator"
    start = run(Fit("start", num_steps=1, lr=1e-12, ranges={"amax": "learned"}), tmp_path)
    found = run(Fit("fit", num_steps=6, lr=1e-3, ranges={"amax": "learned"}), tmp_path)
    moved = [n for n, value in found["state"].items() if not torch.equal(value, start["state"][n])]
    for end in ("_input_quantizer._amax", "_weight_quantizer._amax", "_log_amax", ".weight", ".bias"):
        assert any(name.endswith(end) for name in moved), end
    assert all(value.isfinite().all() for value in found["state"].values())


def test_a_range_has_the_gradient_that_it_has_with_a_float_bias() -> None:
    found = []
    for bias in ("float", "accumulator"):
        subject = copy.deepcopy(_old("learned"))
        if bias == "accumulator":
            snap_biases(subject, {"dense_head.heads_list.0.hm.1": "accumulator"})
        network = subject.network.eval()
        (network(*_voxels(network))[0]["hm"] * 1.5).sum().backward()
        layer = network.get_submodule("dense_head.heads_list.0.hm.1")
        quantizers = layer._input_quantizer, layer._weight_quantizer
        found.append([one._log_amax.grad for one in quantizers] + [layer.weight.grad, layer.bias.grad])
    for ours, plain in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(ours, plain)


def test_a_bias_that_outgrows_its_codes_is_refused_by_export() -> None:
    """In training it saturates, and nothing else says so."""
    subject = _old("ptq")
    snap_biases(subject, {"*": "accumulator"})
    layer: Any = subject.network.get_submodule("dense_head.shared_conv.0")
    with torch.no_grad():
        layer.bias[2] = float(layer.unit()[2]) * LARGEST_BIAS_CODE * 2
    with pytest.raises(
        UserError, match=r"step too small .* \(1 of 8, channels 2\): dense_head.shared_conv.0$"
    ):
        plan_of(subject.network)


def test_the_scheme_of_a_snapped_network_is_read_back() -> None:
    subject = _old("qat")
    snap_biases(subject, {"backbone_3d.*": "fp16"})
    snap_biases(subject, {"dense_head.*": "accumulator"})
    assert subject.scheme is not None
    again = Scheme.from_dict(subject.scheme.to_dict())
    assert again == subject.scheme
    assert {name: one.bias for name, one in again.resolve(subject.prepared.layers).items()} == {
        name: one.bias for name, one in subject.prepared.schemes.items()
    }
    assert replace(again, rules=again.rules[:-2]) == _old("qat").scheme
    assert snap_biases(subject, {"dense_head.*": "accumulator"}) == []


class _Samples:
    def calibration_dataloader(self) -> Any:
        network = CenterPoint(_config("float"))
        return [_voxels(network, seed) for seed in range(2)]

    def calibration_info(self) -> dict[str, Any]:
        return {"num_samples": 2}


def test_bias_correction_takes_no_saturated_bias_for_an_error() -> None:
    """Widened before biases are corrected: else what the saturated code lacks would be added to the bias."""
    network = load(_config("float"), CHECKPOINTS["float"]).network
    conv, norm = network.backbone_2d.blocks[0][1], network.backbone_2d.blocks[0][2]
    with torch.no_grad():
        conv.weight[2] = conv.weight[2] / conv.weight[2].abs().max() * 2e-7
        norm.weight[2], norm.running_var[2], norm.running_mean[2], norm.bias[2] = 1, 1, 0, 0.5
    scheme = Scheme.from_file(INT8)
    subject = restructure(network, "ptq", scheme, None)
    config = CalibrationConfig(bias_correction=True)
    calibrate(subject, _Samples(), lambda net, batch: net(*batch), config, show=False)
    assert abs(float(conv.bias[2]) - 0.5) < 0.05
    assert bias_problems(subject.network) == []


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_steps_are_widened_while_a_network_trains(verb: str, tmp_path: Path) -> None:
    """A bias may outgrow its step: at each validation of a fit the step follows; elsewhere it is refused."""
    content = torch.load(CHECKPOINTS["qat"], weights_only=True)
    content["quantization"]["scheme"] |= {"on_small_step": "widen"}
    content["quantization"]["scheme"]["defaults"]["bias"] = "accumulator"
    torch.save(content, tmp_path / "qat.ckpt")
    detector = CenterPointDetector.load_from_checkpoint(tmp_path / "qat.ckpt")
    layer = detector.network.backbone_2d.blocks[0][1]
    with torch.no_grad():
        layer._weight_quantizer._amax[1] = 1e-7
        layer.bias[1] = 1.0
    detector.trainer = Trainer(accelerator="cpu", logger=False)
    detector.trainer.state.fn = TrainerFn(verb)
    if verb == "validate":
        with pytest.raises(UserError, match="1 layers cannot hold their bias"):
            detector.on_validation_start()
        return
    detector.on_validation_start()
    assert bias_problems(detector.network) == []
    assert layer._weight_quantizer.amax[1] > 1e-6
