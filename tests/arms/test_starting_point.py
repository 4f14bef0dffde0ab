"""`calibrate` with better starting points on: what it changes, writes and refuses."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import distributed, multiprocessing, nn

from cpq_train.arms.loading import from_weights
from cpq_train.arms.starting_point import CalibrationConfig, _agree, spread
from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.topology import blocks_of
from cpq_train.verbs.cli import main

SMALL: dict[str, Any] = {
    "voxel_size": (0.64, 0.64, 0.32),
    "backbone_3d_channels": (4, 8, 8, 8),
    "backbone_3d_num_blocks": (1, 1, 1, 1),
    "backbone_3d_out_channels": 8,
    "backbone_2d_num_layers": (1, 1),
    "backbone_2d_channels": (8, 8),
    "upsample_channels": (8, 8),
    "upsample_strides": (2, 4),
    "head_channels": 8,
}
CONFIG = NetworkConfig(**SMALL)


@pytest.fixture(scope="module")
def scheme_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scheme") / "scheme.yaml"
    scheme = {
        "defaults": {"weight": {"bits": 4}, "input": {"method": "max"}},
        "rules": [{"layers": "dense_head.shared_conv.0", "input": {"method": "foreground"}}],
    }
    file.write_text(yaml.safe_dump(scheme))
    return file


@pytest.fixture(scope="module")
def calibrated(simulated_root: Path, scheme_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Calibrates a fresh network with more options of the command line -> path of the PTQ checkpoint."""
    folder = tmp_path_factory.mktemp("calibrated")
    torch.manual_seed(0)
    subject = build(CONFIG, "float", None)
    state = {f"network.{name}": tensor for name, tensor in subject.network.state_dict().items()}
    torch.save({"state_dict": state, "quantization": subject.describe()}, folder / "float.ckpt")
    options = ["calibrate", "-c", "configs/quickstart_float.yaml", "--data.root", str(simulated_root)]
    options += [
        f"--model.network.{name}={list(v) if isinstance(v, tuple) else v}" for name, v in SMALL.items()
    ]
    options += ["--data.num_sweeps=1", "--data.batch_size=1", "--data.num_workers=0"]
    options += ["--data.num_calibration_samples=3", f"--model.scheme={scheme_file}"]
    options += [f"--model.weights={folder}/float.ckpt", f"--trainer.default_root_dir={folder}"]

    def calibrate(name: str, *more: str) -> Path:
        main([*options, *more, f"--output={folder}/{name}.ckpt"])
        return folder / f"{name}.ckpt"

    return calibrate


@pytest.fixture(scope="module")
def plain(calibrated: Any) -> Path:
    return calibrated("plain")


@pytest.fixture(scope="module")
def improved(calibrated: Any) -> Path:
    options = {"bias_correction": "true", "adaround_num_steps": "5", "num_batches": "2"}
    return calibrated("improved", *(f"--model.calibration.{key}={value}" for key, value in options.items()))


def _changed(path: Path, other: Path) -> set[str]:
    states = [torch.load(p, weights_only=True)["state_dict"] for p in (path, other)]
    return {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}


def test_weights_and_biases_change_and_ranges_do_not(plain: Path, improved: Path) -> None:
    changed = _changed(plain, improved)
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "bias"}
    assert "network.backbone_3d.conv_input.0.bias" in changed
    assert "network.dense_head.heads_list.5.hm.1.bias" in changed


def test_the_checkpoint_says_what_was_done(plain: Path, improved: Path) -> None:
    entries = {"bias_correction": True, "adaround_num_steps": 5, "num_batches": 2}
    assert entries.items() <= from_weights(CONFIG, improved, None, None).describe()["calibration"].items()
    entries = {"bias_correction": False, "adaround_num_steps": 0}
    assert entries.items() <= from_weights(CONFIG, plain, None, None).describe()["calibration"].items()


def test_changed_weights_are_no_float_baseline(plain: Path, improved: Path) -> None:
    assert from_weights(CONFIG, plain, "qat", None).has_float_weights
    assert not from_weights(CONFIG, improved, "qat", None).has_float_weights
    from_weights(CONFIG, plain, "float_tuned", None)
    with pytest.raises(UserError, match="its calibration changed the weights"):
        from_weights(CONFIG, improved, "float_tuned", None)


def _rank(rank: int, address: str, output: Path) -> None:
    distributed.init_process_group("gloo", address, timeout=timedelta(seconds=20), world_size=2, rank=rank)
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    _agree(network)
    torch.save(network.state_dict(), output / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_end_with_the_tensors_of_rank_0(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/store"
    multiprocessing.start_processes(_rank, (address, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    assert torch.equal(first["0.weight"], nn.Conv2d(4, 4, 3).weight)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_blocks_hold_every_convolution_once_in_the_order_of_the_pass() -> None:
    network = CenterPoint(CONFIG).eval()
    blocks, order = list(blocks_of(network)), []
    for name in blocks:
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    network(torch.randn(1, 5), torch.tensor([[0, 3, 20, 20]]).int(), 1)
    # A level's upsampling runs before the next level and is listed behind it: neither reads the other.
    assert [n for n in order if "backbone_2d" not in n] == [n for n in blocks if "backbone_2d" not in n]
    assert sorted(order) == sorted(blocks)
    convolutions = [n for n, m in network.named_modules() if hasattr(m, "kernel_size")]
    for name in convolutions:
        assert sum(name.startswith(f"{block}.") for block in blocks) == 1, name


def test_batches_are_spread_over_the_loader() -> None:
    assert spread(range(12), 4) == [0, 3, 6, 9]
    assert spread(range(3), 8) == [0, 1, 2]


@pytest.mark.parametrize(("name", "value"), [("adaround_num_steps", -1), ("num_batches", 0)])
def test_impossible_numbers_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"model.calibration.{name} is {value}"):
        CalibrationConfig(**{name: value})
