"""What `cpq_train` offers at its top, and what it refuses."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, ResNet18, images
from torch import nn

import cpq_train as cpq

SMALL = cpq.NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_3d_channels=(4, 4, 8, 8),
    backbone_3d_out_channels=8,
    backbone_2d_num_layers=(1, 1),
    backbone_2d_channels=(8, 8),
    upsample_channels=(8, 8),
    head_channels=8,
)


def _small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def _prepared(content: dict | None = None) -> nn.Sequential:
    network = _small()
    cpq.prepare(network, cpq.Scheme.from_dict(content or {}), images(0))
    cpq.calibrate(network, [images(0), images(1)])
    return network


def test_modes_are_afterwards_what_they_were() -> None:
    network = _small()
    cpq.prepare(network, cpq.Scheme.from_dict({}), images(0), fold=False)
    network.train()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    within: list[bool] = []
    network.register_forward_hook(lambda *_: within.append(any(m.training for m in network.modules())))
    cpq.calibrate(network, [images(0)])
    cpq.verify(network, images(0))
    assert within == [False, False]
    assert [module.training for module in network.modules()] == modes


def test_the_prepared_part_of_a_network_is_named() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(_prepared())
    with pytest.raises(cpq.UserError, match=r"this AveragedModel is not prepared; its \.module is$"):
        cpq.verify(averaged, images(0))
    assert cpq.verify(averaged.module, images(0))


def test_every_name_is_there_and_nothing_else() -> None:
    for name in cpq.__all__:
        assert getattr(cpq, name).__name__ == name
    assert set(cpq.__all__) <= set(dir(cpq))
    with pytest.raises(AttributeError, match="module 'cpq_train' has no attribute 'quantise'"):
        cpq.quantise  # noqa: B018
    assert files("cpq_train").joinpath("py.typed").is_file()


def test_mypy_knows_the_names() -> None:
    """It is hidden from it that `__getattr__` answers to any name."""
    (guard,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(cpq)))
        if isinstance(node, ast.If)
        and any(isinstance(inner, ast.FunctionDef) and inner.name == "__getattr__" for inner in node.body)
    )
    assert ast.unparse(guard.test) == "not TYPE_CHECKING"


def test_comparing_needs_no_torch() -> None:
    program = (
        "import sys, cpq_train; cpq_train.compare; cpq_train.UserError; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "coverage": cpq.coverage,
    "fold": cpq.fold,
    "calibrate": lambda network: cpq.calibrate(network, [images(0)]),
    "verify": lambda network: cpq.verify(network, images(0)),
    "save": lambda network: cpq.save(network, "never.ckpt"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_network_that_is_not_prepared(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cpq.UserError, match="this Sequential is not prepared; first: prepare"):
        CALLS[call](_small())
    assert list(tmp_path.iterdir()) == []


def test_ranges_that_were_never_found(tmp_path: Path) -> None:
    network = _small()
    cpq.prepare(network, cpq.Scheme.from_dict({}), images(0))
    for call in (lambda: cpq.save(network, tmp_path / "a.ckpt"), lambda: cpq.verify(network, images(0))):
        with pytest.raises(cpq.UserError, match="2 quantizers have no usable amax"):
            call()
    with pytest.raises(cpq.UserError, match="nothing: it saw no tensor"):
        cpq.calibrate(network, [])
    assert list(tmp_path.iterdir()) == []


def test_an_unfit_range_is_an_error_or_leaves_a_layer_in_float(tmp_path: Path) -> None:
    content = {"rules": [{"layers": "0", "input": {"signed": False}}]}
    with pytest.raises(cpq.UserError, match="an unsigned quantizer clips them"):
        _prepared(content)
    network = _prepared({**content, "on_unfit_range": "float"})
    assert cpq.coverage(network).left_in_float == {"0": "rule 2 (0)"}
    cpq.save(network, tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(cpq.load(tmp_path / "a.ckpt", _small())(images(2)), network(images(2)))


def test_a_method_that_needs_a_detector() -> None:
    with pytest.raises(cpq.UserError, match=r"method foreground .* accepted: max, mse, percentile, entropy"):
        _prepared({"defaults": {"input": {"method": "foreground"}}})


def test_a_checkpoint_of_another_network_leaves_the_given_one_alone(tmp_path: Path) -> None:
    cpq.save(_prepared(), tmp_path / "a.ckpt")
    other = ResNet18(width=4)
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(cpq.UserError, match="is of another architecture than the network: "):
        cpq.load(tmp_path / "a.ckpt", other)
    assert type(other.fc) is nn.Linear
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(cpq.UserError, match="is prepared already"):
        cpq.load(tmp_path / "a.ckpt", _prepared())


def test_a_learned_range_is_saved(tmp_path: Path) -> None:
    from cpq_train.quantization.ranges.policy import apply_policy

    network = _prepared()
    apply_policy(network, "learned")
    cpq.save(network, tmp_path / "a.ckpt")
    again = cpq.load(tmp_path / "a.ckpt", _small())
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in network.named_parameters()]
    assert torch.equal(again(images(2)), network(images(2)))


def test_what_is_loaded_and_saved_again_is_the_same(tmp_path: Path) -> None:
    network = _prepared()
    cpq.save(network, tmp_path / "a.ckpt")
    cpq.save(cpq.load(tmp_path / "a.ckpt", _small()), tmp_path / "b.ckpt")
    one, other = (torch.load(tmp_path / f"{name}.ckpt") for name in "ab")
    assert one["quantization"] == other["quantization"]
    assert all(torch.equal(value, other["state_dict"][n]) for n, value in one["state_dict"].items())
    with torch.no_grad():
        network[0].weight.add_(0.1)
    cpq.save(network, tmp_path / "c.ckpt")
    arms = [torch.load(tmp_path / f"{name}.ckpt")["quantization"]["arm"] for name in "ac"]
    assert arms == ["ptq", "qat"]


def test_centerpoint(tmp_path: Path) -> None:
    """Saved by the library, a CenterPoint is a checkpoint as every other; loading it needs nothing else."""
    torch.manual_seed(0)
    network = cpq.CenterPoint(SMALL)
    cpq.prepare(network, cpq.Scheme.from_file("configs/schemes/int8.yaml"), network.example_input())
    cpq.calibrate(network, [network.example_input()])
    cpq.save(network, tmp_path / "a.ckpt")
    detector = cpq.CenterPointDetector.load_from_checkpoint(tmp_path / "a.ckpt")
    assert detector.subject.arm == "ptq"
    again = cpq.load(tmp_path / "a.ckpt")
    filled = cpq.load(tmp_path / "a.ckpt", cpq.CenterPoint(SMALL))
    for other in (detector.network, again, filled):
        heads = zip(
            network.eval()(*network.example_input()), other.eval()(*network.example_input()), strict=True
        )
        assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in heads for name in ours)
    assert cpq.coverage(again) == cpq.coverage(network)
    cpq.save(again, tmp_path / "again.ckpt")
    one, other = (torch.load(tmp_path / f"{name}.ckpt")["quantization"] for name in ("a", "again"))
    assert one["arm"] == "ptq"
    assert one["calibration"]["num_batches"] == 1
    assert one == other
    assert sum(report.num_mismatched for report in cpq.verify(again, network.example_input())) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_are_bit_equal_and_remember_nothing(how: Callable[[nn.Module], nn.Module]) -> None:
    network = _prepared()
    with torch.no_grad(), cpq.frozen(network):
        expected = network(images(2))
        copied = how(network)
    with torch.no_grad():
        network[0].weight.mul_(2)
        network[0]._input_quantizer._amax.data.mul_(2)
        assert torch.equal(copied(images(2)), expected)
        copied[0].weight.mul_(2)
        copied[0]._input_quantizer._amax.data.mul_(2)
        assert torch.equal(copied(images(2)), network(images(2)))
    assert cpq.coverage(copied) == cpq.coverage(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_the_state_are_those_of_the_float_network(name: str) -> None:
    new, batch_of, _ = NETWORKS[name]
    network = new()
    names = [n for n, _ in network.named_parameters()]
    cpq.prepare(network, cpq.Scheme.from_dict({}), batch_of(0), fold=False)
    assert [n for n, _ in network.named_parameters()] == names
