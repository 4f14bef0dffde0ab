"""The road from a checkpoint to a network: what it takes, what it makes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from old_files import CHECKPOINTS, small_options

from cpq_train.arms.loading import from_weights, load
from cpq_train.common.errors import UserError
from cpq_train.models import NetworkConfig
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantizers
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main
from cpq_train.verbs.describe import describe

BIAS = "network.dense_head.heads_list.0.hm.1.bias"


def _config(name: str) -> NetworkConfig:
    return NetworkConfig(**torch.load(CHECKPOINTS[name], weights_only=True)["hyper_parameters"]["network"])


def _damaged(name: str, folder: Path, tensor: str, value: float) -> Path:
    content = torch.load(CHECKPOINTS[name], weights_only=True)
    content["state_dict"][tensor].view(-1)[0] = value
    torch.save(content, folder / "damaged.ckpt")
    return folder / "damaged.ckpt"


def test_ranges_are_left_aside_for_the_control() -> None:
    """float_tuned from a ptq checkpoint: its weights, in float layers that know nothing of quantization."""
    ptq, tuned = (
        load(_config("ptq"), CHECKPOINTS["ptq"]),
        from_weights(_config("ptq"), CHECKPOINTS["ptq"], "float_tuned"),
    )
    assert quantizers(ptq.network)
    assert not quantizers(tuned.network)
    assert not tuned.network._forward_hooks
    state = tuned.network.state_dict()
    assert {name for name in ptq.network.state_dict() if not name.endswith("_amax")} == set(state)
    assert all(torch.equal(ptq.network.state_dict()[name], value) for name, value in state.items())
    assert (tuned.arm, tuned.batchnorm, tuned.scheme, tuned.calibration) == (
        "float_tuned",
        "folded",
        None,
        None,
    )
    assert list(tuned.parents) == ["float", "ptq"]
    names = {type(module).__name__ for module in tuned.network.modules()}
    assert not any(name.startswith("Quant") for name in names)


@pytest.mark.parametrize(
    ("source", "arm"),
    [
        ("float", None),
        ("float", "ptq"),
        ("ptq", "qat"),
        ("qat", None),
        ("float_tuned", None),
        ("learned", None),
    ],
)
def test_every_descent(source: str, arm: str | None) -> None:
    scheme = Scheme.from_file("configs/schemes/int8.yaml") if arm == "ptq" else None
    subject = from_weights(_config(source), CHECKPOINTS[source], arm, scheme)  # type: ignore[arg-type]
    assert subject.arm == (arm or torch.load(CHECKPOINTS[source], weights_only=True)["quantization"]["arm"])
    assert subject.needs_calibration == (arm == "ptq")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_is_looked_at(name: str, value: float, tmp_path: Path) -> None:
    path = _damaged(name, tmp_path, BIAS, value)
    expected = (
        rf"damaged.ckpt': 1 tensors hold NaN or infinite numbers: {BIAS.removeprefix('network.')} \(1 of 1\)"
    )
    with pytest.raises(UserError, match=expected):
        load(_config(name), path)
    with pytest.raises(UserError, match=expected):
        CenterPointDetector.load_from_checkpoint(path)


@pytest.mark.parametrize("verb", ["calibrate", "validate", "validate --ckpt_path", "verify", "profile"])
def test_no_verb_runs_a_nan(
    verb: str, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_damaged("float" if verb == "calibrate" else "qat", tmp_path, BIAS, torch.nan))
    options = small_options(simulated_root, tmp_path / "run")
    arguments = {
        "calibrate": [
            *("calibrate", *options, "--model.weights", path, "--output", str(tmp_path / "ptq.ckpt")),
            *("--model.scheme", "configs/schemes/int8.yaml"),
        ],
        "validate": ["validate", *options, "--model.weights", path],
        "validate --ckpt_path": ["validate", *options, "--ckpt_path", path],
        "verify": ["verify", path],
        "profile": ["profile", *options, "--model.weights", path],
    }[verb]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "1 tensors hold NaN or infinite numbers" in error
    assert "differ" not in error
    assert not (tmp_path / "ptq.ckpt").exists()
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("missing", ["arm", "scheme", "batchnorm", "layers", "calibration", "parents"])
def test_an_incomplete_description_is_refused(missing: str, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    del content["quantization"][missing]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(UserError, match=f"quantization: needs '{missing}', and has "):
        load(_config("ptq"), tmp_path / "less.ckpt")


@pytest.mark.parametrize(
    ("key", "value"), [("why_simulated", torch.zeros(2)), ("kind", None), ("weight", {}), ("input", 3)]
)
def test_a_wrong_row_of_a_layer_is_refused(key: str, value: object, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    next(iter(content["quantization"]["layers"].values()))[key] = value
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=rf"odd\.ckpt', quantization, layers, .*, {key}(: |, )"):
        describe(tmp_path / "odd.ckpt")


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    content["hyper_parameters"]["ranges"]["decay"] = 0.5
    torch.save(content, tmp_path / "more.ckpt")
    with pytest.raises(UserError, match=r"hyper_parameters.ranges: .*'decay'"):
        CenterPointDetector.load_from_checkpoint(tmp_path / "more.ckpt")
    del content["hyper_parameters"]["ranges"]["decay"]
    content["hyper_parameters"]["tempo"] = 2
    torch.save(content, tmp_path / "more.ckpt")
    with pytest.raises(UserError, match=r"hyper_parameters: 'tempo' unknown; accepted: network, weights"):
        CenterPointDetector.load_from_checkpoint(tmp_path / "more.ckpt")


def test_settings_given_take_the_place_of_the_checkpoints() -> None:
    detector = CenterPointDetector.load_from_checkpoint(CHECKPOINTS["qat"], test_time_flip=True)
    assert detector.test_time_flip
    for name, value in {"strict": False, "arm": "float", "map_location": {"cpu": "cuda"}}.items():
        with pytest.raises(UserError, match=name):
            CenterPointDetector.load_from_checkpoint(CHECKPOINTS["qat"], **{name: value})


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.complex64])
def test_weights_are_real_numbers(kind: torch.dtype, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    content["state_dict"][BIAS] = content["state_dict"][BIAS].to(kind)
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=f"1 tensors hold other numbers .*{kind} instead of torch.float32"):
        load(_config("ptq"), tmp_path / "odd.ckpt")


@pytest.mark.parametrize("value", [None, "x", [1]])
def test_settings_that_are_no_mapping(value: object, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    torch.save({**content, "hyper_parameters": value}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"hyper_parameters is .*; expected a mapping"):
        CenterPointDetector.load_from_checkpoint(tmp_path / "odd.ckpt")


def test_the_network_is_not_there_before_it_is_built() -> None:
    with pytest.raises(RuntimeError, match="built by configure_model, or by loading a checkpoint"):
        CenterPointDetector().subject  # noqa: B018


def test_describe_names_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", str(_damaged("qat", tmp_path, BIAS, torch.nan))])
    assert f"{BIAS.removeprefix('network.')} (1 of 1)" in capsys.readouterr().out
