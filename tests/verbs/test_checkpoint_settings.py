"""What commands take from a checkpoint, from its configuration's folder, and from what is given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exported_files import DATA as OLD_DATA
from exported_files import stating
from old_files import CHECKPOINTS, SCHEMA_1, small_options

from cpq_train.common.errors import UserError
from cpq_train.data.settings import DataSettings
from cpq_train.verbs.cli import main
from cpq_train.verbs.given import Given

DATA = {**OLD_DATA, "max_points_per_voxel": 3, "max_num_voxels_train": 500, "max_num_voxels_eval": 700}


def _stating(folder: Path, name: str = "qat", **data: Any) -> Path:
    """An old checkpoint that says with what data settings it was made."""
    return stating(folder, name, **{**DATA, **data})


def _num_codes(checkpoint: Path, root: Path, *more: str) -> int:
    output = checkpoint.parent / "verify.json"
    main(["verify", str(checkpoint), "--root", str(root), "--output", str(output), *more])
    num: int = json.loads(output.read_text())["end_to_end"]["num_codes"]
    return num


def test_verify_takes_the_data_of_the_checkpoint(simulated_root: Path, tmp_path: Path) -> None:
    stating = _stating(tmp_path, max_num_voxels_eval=60000)
    assert _num_codes(stating, simulated_root) == _num_codes(stating, simulated_root, "--num_sweeps", "2")
    one_sweep, few_voxels = _stating(tmp_path, num_sweeps=1), None
    assert _num_codes(one_sweep, simulated_root) < _num_codes(one_sweep, simulated_root, "--num_sweeps", "2")
    few_voxels = _num_codes(_stating(tmp_path), simulated_root)
    assert few_voxels < _num_codes(_stating(tmp_path, max_num_voxels_eval=60000), simulated_root)
    cloud = next((simulated_root / "samples/LIDAR_TOP").glob("*.bin"))
    assert _num_codes(_stating(tmp_path), simulated_root, "--num_sweeps", "1") > 0
    output = tmp_path / "cloud.json"
    counts = []
    for num_voxels in (700, 60000):
        checkpoint = _stating(tmp_path, max_num_voxels_eval=num_voxels)
        main(["verify", str(checkpoint), "--cloud", str(cloud), "--output", str(output)])
        counts.append(json.loads(output.read_text())["end_to_end"]["num_codes"])
    assert counts[0] < counts[1]


def test_verify_says_what_it_assumes(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(CHECKPOINTS["qat"]), "--root", str(simulated_root)])
    out = " ".join(capsys.readouterr().out.split())
    assert "does not say with what data settings it was made: taking num_sweeps 10" in out
    main(["verify", str(_stating(tmp_path)), "--root", str(simulated_root)])
    assert "does not say" not in capsys.readouterr().out


def _saved(run: Path) -> dict[str, Any]:
    saved: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())["data"]
    return saved


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A configuration that says nothing of the data."""
    content = yaml.safe_load((SCHEMA_1 / "float/config.yaml").read_text())
    del content["data"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "bare.yaml"


@pytest.mark.parametrize("option", ["--model.weights", "--ckpt_path"])
def test_validate_takes_the_data_of_the_checkpoint(
    option: str, bare: Path, simulated_root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = tmp_path / "run"
    options = ["-c", str(bare), "--data.root", str(simulated_root), "--data.num_workers", "0"]
    options += ["--trainer.default_root_dir", str(run), option, str(_stating(tmp_path))]
    main(["validate", *options, "--data.max_points_per_voxel", "10"])
    taken = ("num_sweeps", "max_num_voxels_train", "max_num_voxels_eval")
    assert {name: _saved(run)[name] for name in taken} == {name: DATA[name] for name in taken}
    assert _saved(run)["max_points_per_voxel"] == 10
    said = [str(warning.message) for warning in recwarn]
    assert any(
        "data.max_points_per_voxel is 10; checkpoint" in text and "made with 3" in text for text in said
    )
    assert not any("data.num_sweeps is" in text for text in said)


def test_a_file_without_the_key_takes_the_defaults_and_says_so(
    bare: Path, simulated_root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = tmp_path / "run"
    options = ["-c", str(bare), "--data.root", str(simulated_root), "--data.num_workers", "0"]
    options += ["--trainer.default_root_dir", str(run), "--model.weights", str(CHECKPOINTS["ptq"])]
    main(["validate", *options, "--data.num_sweeps", "1"])
    assert _saved(run)["num_sweeps"] == 1
    assert _saved(run)["max_points_per_voxel"] == 10
    (said,) = (str(w.message) for w in recwarn if "with what data settings" in str(w.message))
    assert said.endswith(
        "data.max_points_per_voxel 10, data.max_num_voxels_train 60000, data.max_num_voxels_eval 60000"
    )
    assert "data.num_sweeps" not in said


@pytest.mark.parametrize("stated", [{"num_sweeps": 2}, "ten sweeps", None])
def test_what_is_no_data_key_is_refused(stated: Any) -> None:
    if stated is None:
        assert DataSettings.of({"data": None}, "x.ckpt") is None
        return
    with pytest.raises(UserError, match=r"'x.ckpt', data: .*; expected max_num_voxels_eval, "):
        DataSettings.of({"data": stated}, "x.ckpt")


def test_every_checkpoint_says_its_data(arms: dict[str, Path]) -> None:
    paths = {arm: folder / "checkpoints/last.ckpt" for arm, folder in arms.items() if arm != "ptq"}
    for path in (*paths.values(), arms["ptq"] / "ptq.ckpt"):
        content = torch.load(path, weights_only=True)
        assert content["data"]["num_sweeps"] == 2
        assert content["data"]["voxel_size"] == (0.64, 0.64, 0.32)


def test_a_scheme_beside_its_configuration(
    simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy("configs/schemes/int8.yaml", folder / "mine.yaml")
    (folder / "qat.yaml").write_text(yaml.safe_dump({"model": {"scheme": "mine.yaml"}}))
    monkeypatch.chdir(tmp_path)
    options = ["calibrate", *small_options(simulated_root, tmp_path / "run"), "-c", "elsewhere/qat.yaml"]
    options += ["--model.weights", str(CHECKPOINTS["float"]), "--output", str(tmp_path / "ptq.ckpt")]
    main(options)
    content = torch.load(tmp_path / "ptq.ckpt", weights_only=True)
    assert content["quantization"]["scheme"]["name"] == "int8"
    assert content["hyper_parameters"]["scheme"] == "elsewhere/mine.yaml"
    with pytest.raises(SystemExit):
        main([*options, "--model.scheme", "other.yaml"])
    assert "scheme file 'other.yaml' does not exist" in " ".join(capsys.readouterr().err.split())


def test_shipped_configurations_work_from_anywhere(
    simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = Path("configs/qat_int8.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    options = small_options(simulated_root, tmp_path / "run")
    more = ["-c", str(overlay), "--trainer.max_epochs", "1", "--data.num_calibration_samples", "2"]
    more += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    weights = ["--model.weights", str(CHECKPOINTS["float"]), "--output", str(tmp_path / "ptq.ckpt")]
    main(["calibrate", *options, *more, *weights])
    assert (tmp_path / "ptq.ckpt").is_file()


def test_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump({"data": {"num_sweeps": 5, "augmentation": {"flip": True}}}))
    Path("model.yaml").write_text(yaml.safe_dump({"scheme": "s.yaml"}))
    args = ["fit", "--model.network.voxel_size=[1,1,1]", "--model", "model.yaml", "--data.max_points", "3"]
    args += ["--model.ranges", '{"amax": "learned"}', "-c", "c.yaml", "--ckpt", "last"]
    given = Given(args, [Path("c.yaml")])
    for name in ("data.num_sweeps", "data.max_points_per_voxel", "model.ranges.amax", "model.scheme"):
        assert name in given, name
    for name in (
        "data.num_workers",
        "data.num",
        "model.arm",
        "model.ranges.lr",
        "model.network.head_channels",
    ):
        assert name not in given, name
    assert given.on_command_line("ckpt_path")
    assert not given.on_command_line("seed_everything")
    places = ("data.num_sweeps", "model.scheme", "model.ranges.amax", "model.arm", "model.network")
    assert [given.place_of(name) for name in places] == [0, 1, 1, -1, -1]
    assert given.file_that_says("model.scheme", "s.yaml") == Path("model.yaml")
    assert given.file_that_says("data.num_sweeps", 5) == Path("c.yaml")
    assert given.file_that_says("data.num_sweeps", 6) is None


def test_a_group_from_a_file_leaves_the_rest_to_the_checkpoint(
    simulated_root: Path, bare: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"root": str(simulated_root), "num_workers": 0}))
    options = ["-c", str(bare), "--data", str(data), "--trainer.default_root_dir", str(run)]
    main(["validate", *options, "--ckpt_path", str(_stating(tmp_path))])
    assert _saved(run)["num_sweeps"] == 2


@pytest.mark.parametrize(
    ("name", "value"), [("num_sweeps", "two"), ("max_num_voxels_eval", None), ("voxel_size", [1.0])]
)
def test_what_is_no_data_setting_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"data.{name} is .*; expected something like"):
        DataSettings.of({"data": {**DATA, name: value}}, "x.ckpt")


def test_last_takes_the_data_of_the_run(simulated_root: Path, bare: Path, tmp_path: Path) -> None:
    """Not of the weights that it began with, which may be gone or others by then."""
    run, weights = tmp_path / "run", _stating(tmp_path, "float", num_sweeps=1)
    options = ["fit", "-c", str(bare), "--data.root", str(simulated_root), "--data.num_workers", "0"]
    options += ["--data.batch_size", "2", "--trainer.default_root_dir", str(run)]
    options += ["--baselines.cache_dir", str(tmp_path / "b"), "--model.weights", str(weights)]
    options += ["--ckpt_path", "last"]
    main(options)
    assert _saved(run)["num_sweeps"] == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    weights.write_bytes(b"torn")
    main([*options, "--trainer.max_epochs", "2"])
    assert _saved(run)["num_sweeps"] == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["data"]["num_sweeps"] == 1


def test_a_scheme_found_beside_its_configuration_is_not_needed_again(
    simulated_root: Path, tmp_path: Path
) -> None:
    own = torch.load(CHECKPOINTS["ptq"], weights_only=True)["quantization"]["scheme"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "qat.yaml").write_text(yaml.safe_dump({"model": {"scheme": "mine.yaml", "arm": "qat"}}))
    options = ["fit", *small_options(simulated_root, tmp_path / "run"), "-c", str(tmp_path / "qat.yaml")]
    options += ["--model.weights", str(CHECKPOINTS["ptq"]), "--ckpt_path", "last"]
    main(options)
    (tmp_path / "mine.yaml").unlink()
    main([*options, "--trainer.max_epochs", "2"])
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("content", [b"torn", None])
def test_a_bad_checkpoint_in_a_configuration(
    content: bytes | None, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.ckpt"
    if content is None:
        torch.save([1], file)
    else:
        file.write_bytes(content)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"ckpt_path": str(file)}))
    options = [*small_options(simulated_root, tmp_path / "run"), "-c", str(tmp_path / "c.yaml")]
    with pytest.raises(SystemExit) as exit_:
        main(["validate", *options])
    assert exit_.value.code == 2
    assert "bad.ckpt" in capsys.readouterr().err
