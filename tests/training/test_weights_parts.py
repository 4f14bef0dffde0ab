"""A float network that starts with parts of another's weights, and what is made of it afterwards."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import fails
from old_files import CHECKPOINTS, small_options

from cpq_train.arms.loading import from_weights
from cpq_train.arms.partial_start import start_with_parts
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.models import NetworkConfig
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")

PARTS = ["backbone_3d", "backbone_2d", "dense_head.shared_conv"]
OTHER_CLASSES = ["--model.network.class_names", "[bus, car]", "--model.network.class_groups", "[[bus, car]]"]
SOURCE = CHECKPOINTS["float"]


def _config(**changes: Any) -> NetworkConfig:
    """The network of the old float checkpoint, with changes."""
    network = torch.load(SOURCE, weights_only=True)["hyper_parameters"]["network"]
    return replace(NetworkConfig(**network), **changes)


ONE_CLASS = {"class_names": ("truck",), "class_groups": (("truck",),)}


def test_the_parts_are_taken_and_the_rest_is_fresh() -> None:
    """Running statistics too; the fresh modules are as the same seed makes them without weights."""
    torch.manual_seed(7)
    start = start_with_parts(_config(**ONE_CLASS), SOURCE, PARTS)
    torch.manual_seed(7)
    fresh = CenterPointDetector(_config(**ONE_CLASS))
    fresh.start_untrained()
    source = torch.load(SOURCE, weights_only=True)["state_dict"]
    own = fresh.network.state_dict()
    state = start.subject.network.state_dict()
    assert state.keys() == own.keys()
    for name, tensor in state.items():
        is_taken = name.startswith(("backbone", "dense_head.shared_conv"))
        assert torch.equal(tensor, source[f"network.{name}"] if is_taken else own[name]), name
    assert not torch.equal(
        own["backbone_2d.blocks.0.2.running_var"], state["backbone_2d.blocks.0.2.running_var"]
    )
    assert start.subject.parents == {"pretrained": sha256_of(SOURCE)}
    assert (start.subject.arm, start.subject.batchnorm) == ("float", "trained")
    assert list(start.taken) == PARTS
    assert list(start.fresh) == ["dense_head.heads_list"]
    num_parameters = sum(parameter.numel() for parameter in start.subject.network.parameters())
    assert sum(start.taken.values()) + sum(start.fresh.values()) == num_parameters


def test_what_is_listed_are_the_largest_modules() -> None:
    start = start_with_parts(_config(), SOURCE, ["backbone_3d.conv1", "backbone_3d.conv2", "dense_head"])
    assert list(start.taken) == ["backbone_3d.conv1", "backbone_3d.conv2", "dense_head"]
    kept = ["conv_input", "conv3", "conv4", "conv_out"]
    assert list(start.fresh) == [*(f"backbone_3d.{name}" for name in kept), "backbone_2d"]
    taken, fresh = start.summary("nusc.ckpt").split("\n")
    assert taken.startswith("taken from 'nusc.ckpt': backbone_3d.conv1 (")
    assert fresh.startswith(
        f"left fresh: backbone_3d.conv_input ({start.fresh['backbone_3d.conv_input']:,} par"
    )


def test_sizes_need_to_agree_in_the_parts_only() -> None:
    wide_head = _config(head_channels=16, point_cloud_range=(-20.48, -20.48, -5.0, 20.48, 20.48, 3.0))
    assert "dense_head" in start_with_parts(wide_head, SOURCE, PARTS[:2]).fresh
    with pytest.raises(
        UserError, match=r"dense_head.shared_conv.0.weight \(8, 16, 3, 3\) instead of \(16, 16, "
    ):
        start_with_parts(wide_head, SOURCE, PARTS)


def _kept_batchnorm(folder: Path, batchnorm: str) -> Path:
    """A float_tuned checkpoint whose BatchNorm is still there."""
    subject = from_weights(_config(), SOURCE, "float_tuned", None, batchnorm)  # type: ignore[arg-type]
    state = {f"network.{name}": tensor for name, tensor in subject.network.state_dict().items()}
    torch.save({"state_dict": state, "quantization": subject.describe()}, folder / "tuned.ckpt")
    return folder / "tuned.ckpt"


@pytest.mark.parametrize("batchnorm", ["frozen", "trained"])
def test_a_tuned_checkpoint_with_its_batchnorm_is_a_source(batchnorm: str, tmp_path: Path) -> None:
    tuned = _kept_batchnorm(tmp_path, batchnorm)
    start = start_with_parts(_config(**ONE_CLASS), tuned, PARTS)
    assert start.subject.batchnorm == "trained"
    assert start.subject.parents == {"pretrained": sha256_of(tuned)}


@pytest.mark.parametrize("name", ["ptq", "qat", "float_tuned"])
def test_other_checkpoints_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"is '{name}', its BatchNorm folded; accepted .*: a float checkpoint"
    ):
        start_with_parts(_config(), CHECKPOINTS[name], PARTS)


@pytest.mark.parametrize(
    "part", ["backbone", "backbone_3d.conv", "vfe", "map_to_bev_module", "dense_head.", ""]
)
def test_a_part_that_is_no_module_is_refused(part: str) -> None:
    with pytest.raises(
        UserError, match=rf"names '{part}', .*; accepted: backbone_3d, backbone_2d, dense_head, and"
    ):
        start_with_parts(_config(), SOURCE, ["backbone_3d", part])


def test_no_part_is_refused() -> None:
    with pytest.raises(UserError, match="accepted: backbone_3d"):
        start_with_parts(_config(), SOURCE, [])


def test_a_part_that_the_checkpoint_lacks_is_refused() -> None:
    three_heads = _config(class_groups=(("car",), ("bus",), ("truck",)))
    with pytest.raises(UserError, match=r"in model.weights_parts: \d+ missing \(dense_head.heads_list.2"):
        start_with_parts(three_heads, SOURCE, ["dense_head.heads_list.2"])


def test_nan_in_a_part_is_refused_and_elsewhere_it_does_not_matter(tmp_path: Path) -> None:
    content = torch.load(SOURCE, weights_only=True)
    content["state_dict"]["network.backbone_2d.blocks.0.1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    start_with_parts(_config(), tmp_path / "nan.ckpt", ["backbone_3d"])
    with pytest.raises(
        UserError, match=r"1 tensors hold NaN or infinite numbers: backbone_2d.blocks.0.1.weight"
    ):
        start_with_parts(_config(), tmp_path / "nan.ckpt", PARTS)


def _fit(root: Path, run: Path, source: Path, *more: str) -> list[str]:
    start = ["--model.weights", str(source), "--model.weights_parts", str(PARTS)]
    return ["fit", *small_options(root, run), *start, *OTHER_CLASSES, *more]


@pytest.fixture(scope="module")
def tuned(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit onto other classes, whose source is gone by now."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copy(SOURCE, folder / "nusc.ckpt")
    main(_fit(simulated_root, folder / "run", folder / "nusc.ckpt"))
    (folder / "nusc.ckpt").unlink()
    return folder / "run"


def _last(run: Path) -> Path:
    return run / "checkpoints/last.ckpt"


def test_a_fit_says_what_it_took(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(_fit(simulated_root, tmp_path / "run", SOURCE))
    said = capsys.readouterr().out
    assert f"taken from '{SOURCE}': backbone_3d (" in said
    assert "left fresh: dense_head.heads_list (" in said
    assert read_metrics(tmp_path / "run/metrics.json")["parents"] == {"pretrained": sha256_of(SOURCE)}


def test_a_fit_goes_on_without_the_source(
    tuned: Path, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command with `last`, as a requeued job has it; the parts are not taken again."""
    shutil.copytree(tuned, tmp_path / "run")
    more = ["--trainer.max_epochs", "2", "--ckpt_path", "last"]
    main(_fit(simulated_root, tmp_path / "run", tuned.parent / "nusc.ckpt", *more))
    assert "taken from" not in capsys.readouterr().out
    before, after = (torch.load(_last(run), weights_only=True) for run in (tuned, tmp_path / "run"))
    assert after["global_step"] == 2 * before["global_step"]
    assert after["quantization"]["parents"] == before["quantization"]["parents"]
    assert after["hyper_parameters"]["weights_parts"] == PARTS


def test_its_checkpoint_loads_without_the_source(tuned: Path) -> None:
    detector = CenterPointDetector.load_from_checkpoint(_last(tuned))
    state = torch.load(_last(tuned), weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())
    assert list(detector.subject.parents) == ["pretrained"]


def test_its_configuration_with_its_checkpoint_takes_all_of_it(
    tuned: Path, simulated_root: Path, tmp_path: Path
) -> None:
    """The saved config.yaml names parts, which are those of the weights that the fit began with."""
    saved = yaml.safe_load((tuned / "config.yaml").read_text())["model"]
    assert (saved["weights"], saved["weights_parts"]) == (str(tuned.parent / "nusc.ckpt"), PARTS)
    options = ["-c", str(tuned / "config.yaml"), "--data.root", str(simulated_root)]
    with pytest.warns(UserWarning, match="weights_parts .* is left out: it was said of other weights than"):
        main(
            [
                *("validate", *options, "--model.weights", str(_last(tuned))),
                *("--trainer.default_root_dir", str(tmp_path / "again")),
            ]
        )
    then, now = (read_metrics(run / "metrics.json") for run in (tuned, tmp_path / "again"))
    assert now["metrics"] == then["metrics"]
    assert now["config"]["weights_parts"] is None
    assert (tmp_path / "again/results_nusc.json").read_bytes() == (tuned / "results_nusc.json").read_bytes()


def test_a_file_behind_it_may_name_the_weights(tuned: Path, simulated_root: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"model": {"weights": str(_last(tuned))}}))
    files = ["-c", str(tuned / "config.yaml"), "-c", str(tmp_path / "more.yaml")]
    run = ["--data.root", str(simulated_root), "--trainer.default_root_dir", str(tmp_path / "again")]
    with pytest.warns(UserWarning, match="is left out"):
        main(["validate", *files, *run])
    assert (
        read_metrics(tmp_path / "again/metrics.json")["metrics"]
        == read_metrics(tuned / "metrics.json")["metrics"]
    )


def test_calibration_and_qat_start_from_its_checkpoint(
    tuned: Path, simulated_root: Path, tmp_path: Path
) -> None:
    config = ["-c", str(tuned / "config.yaml"), "--data.root", str(simulated_root)]
    config += [
        "--model.scheme",
        "configs/schemes/int8.yaml",
        "--baselines.cache_dir",
        str(tmp_path / "cache"),
    ]
    ptq = tmp_path / "ptq.ckpt"
    weights = ["--model.weights", str(_last(tuned)), "--trainer.default_root_dir", str(tmp_path / "ptq")]
    main(["calibrate", *config, *weights, "--output", str(ptq)])
    run = [
        "--model.arm",
        "qat",
        "--model.weights",
        str(ptq),
        "--trainer.default_root_dir",
        str(tmp_path / "qat"),
    ]
    main(["fit", *config, *run])
    said = torch.load(_last(tmp_path / "qat"), weights_only=True)["quantization"]
    assert said["arm"] == "qat"
    assert said["parents"]["pretrained"] == sha256_of(SOURCE)
    assert said["parents"]["float"] == sha256_of(_last(tuned))
    assert yaml.safe_load((tmp_path / "qat/config.yaml").read_text())["model"]["weights_parts"] is None


REFUSED = {
    "qat": (["fit", "--model.arm", "qat"], "with arm 'qat': accepted: float"),
    "float_tuned": (["fit", "--model.arm", "float_tuned"], "with arm 'float_tuned': accepted: float"),
    "validate": (
        ["validate"],
        "begins a fit, and this is none: give the checkpoint that it wrote as model.weights",
    ),
    "calibrate": (["calibrate", "--output", "ptq.ckpt"], "begins a fit, and this is none"),
    "sensitivity": (["sensitivity", "--output", "out"], "begins a fit, and this is none"),
    "profile": (["profile", "--output", "profile"], "begins a fit, and this is none"),
    "no weights": (["fit", "--model.weights", "null"], "without model.weights: expected the checkpoint"),
    "batchnorm": (["fit", "--model.batchnorm", "frozen"], "accepted for arm 'float': trained"),
    "no part": (["fit", "--model.weights_parts", "[neck]"], "names 'neck', which is no module with weights"),
    "no list": (
        ["fit", "--model.weights_parts", "3"],
        "model.weights_parts: got '3', accepted: list[str], null",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_do_not_start_is_refused(
    name: str,
    simulated_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (verb, *more), says = REFUSED[name]
    scheme = str(Path("configs/schemes/int8.yaml").resolve())
    monkeypatch.chdir(tmp_path)
    options = [verb, *_fit(simulated_root, tmp_path / "run", SOURCE, "--model.scheme", scheme)[1:], *more]
    assert says in fails(options, capsys)
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "ptq.ckpt").exists()
