"""What the library's checkpoints hold, and what of them a network is not filled with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpq_train as cpq
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.verbs.cli import main


class Net(nn.Module):
    """Two layers read one tensor; one of them has a BatchNorm of its own in front of it."""

    def __init__(self, **changes: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        for name, module in changes.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.b(x) + self.c(x)


def x(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def _calibrated(network: nn.Module, content: dict[str, Any] | None = None, fold: bool = True) -> nn.Module:
    cpq.prepare(network.eval(), cpq.Scheme.from_dict(content or {}), x(), fold)
    cpq.calibrate(network, [x()])
    return network


def _arm(network: nn.Module, path: Path) -> str:
    cpq.save(network, path)
    return str(torch.load(path)["quantization"]["arm"])


class Scaled(Net):
    """A parameter of one value, and a buffer with all that a mask may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_all_tensors_can_be_saved(tmp_path: Path) -> None:
    """Whatever their memory format, which does not make other weights of them."""
    network = _calibrated(Scaled().to(memory_format=torch.channels_last))
    assert _arm(network, tmp_path / "a.ckpt") == "ptq"
    assert _arm(network.to(memory_format=torch.contiguous_format), tmp_path / "b.ckpt") == "ptq"
    again = cpq.load(tmp_path / "a.ckpt", Scaled()).eval()
    assert torch.equal(again(x(1)), network(x(1)))
    assert torch.equal(again.mask, network.mask)
    with torch.no_grad():
        network.scale.mul_(2)
    assert _arm(network, tmp_path / "c.ckpt") == "qat"


@pytest.mark.parametrize("num_passes", [0, 1])
def test_statistics_that_moved_are_training(num_passes: int, tmp_path: Path) -> None:
    network = _calibrated(Net(), fold=False).train()
    for seed in range(num_passes):
        network(x(seed))
    assert _arm(network, tmp_path / "kept.ckpt") == ("qat" if num_passes else "ptq")
    cpq.fold(network)
    assert _arm(network, tmp_path / "folded.ckpt") == ("qat" if num_passes else "ptq")


def test_ranges_that_were_learned_are_training(tmp_path: Path) -> None:
    network = _calibrated(Net())
    apply_policy(network, "learned")
    prepared_of(network).remember_weights(network)
    assert _arm(network, tmp_path / "before.ckpt") == "ptq"
    ranges = [p for name, p in network.named_parameters() if name.endswith("_log_amax")]
    network(x()).square().sum().backward()
    torch.optim.SGD(ranges, 1e-3).step()
    assert _arm(network, tmp_path / "after.ckpt") == "qat"


class Remembering(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def _spoilt(name: str) -> nn.Module:
    network = _calibrated(Net(), fold=False)
    with torch.no_grad():
        network.state_dict()[name].view(-1)[0] = torch.nan
    return network


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "extra state": (
        lambda: _calibrated(Remembering()),
        r"state_dict, network._extra_state: got {'steps': 1}, accepted: a dense tensor",
    ),
    "parameter": (
        lambda: _spoilt("norm.weight"),
        r": 1 tensors hold NaN or infinite numbers: norm.weight \(1 of 8\)",
    ),
    "statistic": (
        lambda: _spoilt("norm.running_var"),
        r": 1 tensors hold NaN or infinite numbers: norm.running_var",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_loaded_is_not_saved(case: str, tmp_path: Path) -> None:
    make, message = UNSAVABLE[case]
    with pytest.raises(cpq.UserError, match=message):
        cpq.save(make(), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def _refused(path: Path, network: nn.Module, message: str) -> None:
    """Loading fails, and the network is what it was."""
    types, state = [type(m) for m in network.modules()], copy.deepcopy(network.state_dict())
    with pytest.raises(cpq.UserError, match=message):
        cpq.load(path, network)
    assert [type(m) for m in network.modules()] == types
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


ANOTHER = "another architecture than the network: layers: "
OTHERS: dict[str, tuple[dict[str, nn.Module], str]] = {
    "no layer": ({"b": nn.ReLU()}, rf"{ANOTHER}1 unexpected \(b\)"),
    "another kind": ({"b": nn.Linear(8, 8)}, rf"{ANOTHER}1 of another kind \(b Conv2d instead of Linear\)"),
    "a layer more": ({"d": nn.Linear(8, 8)}, rf"{ANOTHER}1 missing \(d\)"),
    "no BatchNorm": ({"norm": nn.Identity()}, "folds: 'norm' into 'a': got Identity, accepted: a BatchNorm"),
    "no statistics": (
        {"norm": nn.BatchNorm2d(8, track_running_stats=False)},
        "got BatchNorm2d, accepted: a BatchNorm with running statistics",
    ),
    "another width": ({"norm": nn.BatchNorm2d(6)}, "'norm' into 'a': got 6 channels, accepted: 8"),
    "refused": ({"a": nn.Conv2d(4, 8, 1, padding_mode="circular")}, "into 'a': padding_mode 'circular'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_network_of_equal_names(case: str, tmp_path: Path) -> None:
    cpq.save(_calibrated(Net()), tmp_path / "a.ckpt")
    changes, message = OTHERS[case]
    _refused(tmp_path / "a.ckpt", Net(**changes), message)


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "overlap": ({"one_tensor": [["b", "c"], ["a", "b"]]}, "one_tensor: 'b' is there twice"),
    "no layer": ({"one_tensor": [["b", "norm"]]}, "one_tensor: got 'norm', accepted: layers"),
    "no add": ({"one_tensor": [["b", "c:residual"]]}, "one_tensor: got 'c:residual', accepted: layers, and"),
    "unknown": (
        {"folds": {"bn": "a"}},
        "folds: 'bn' into 'a': got no module of that name, accepted: a Batch",
    ),
    "no target": ({"folds": {"norm": "norm"}}, "'norm' into 'norm': got BatchNorm2d, accepted: SubMConv3d"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_wiring_that_cannot_be(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGE[case]
    cpq.save(_calibrated(Net()), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt")
    content["quantization"]["wiring"].update(changes)
    torch.save(content, tmp_path / "a.ckpt")
    _refused(tmp_path / "a.ckpt", Net(), rf"a.ckpt', quantization, wiring, .*{message}")


def test_a_layer_that_reads_two_tensors_is_in_two_groups(tmp_path: Path) -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__(d=nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.a(x)))
            z = self.b(y)
            return self.b(z) + self.c(y) + self.d(z)

    network = _calibrated(Both(), {"on_reuse": "one_range"})
    assert sorted(prepared_of(network).wiring.one_tensor) == [("b", "c"), ("b", "d")]
    cpq.save(network, tmp_path / "a.ckpt")
    assert torch.equal(cpq.load(tmp_path / "a.ckpt", Both()).eval()(x(1)), network(x(1)))


def test_two_norms_in_one_layer(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__(second=nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(super().forward(x))

    cpq.save(_calibrated(Two()), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt")
    content["quantization"]["wiring"]["folds"]["second"] = "a"
    torch.save(content, tmp_path / "a.ckpt")
    _refused(tmp_path / "a.ckpt", Two(), "folds: 'a' takes up several; accepted: one BatchNorm for each")


def test_a_bias_that_no_step_can_hold(tmp_path: Path) -> None:
    """It is found once the tensors are loaded, and the given network has none of them yet."""
    cpq.save(_calibrated(Net(), {"defaults": {"bias": "accumulator"}}), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt")
    content["state_dict"]["network.a.bias"].fill_(1e20)
    torch.save(content, tmp_path / "a.ckpt")
    _refused(tmp_path / "a.ckpt", Net(), "a.ckpt': 1 layers cannot hold their bias")


def _weights_parts(path: Path) -> None:
    detector = cpq.CenterPointDetector(weights=str(path), weights_parts=["backbone_3d"])
    detector.configure_model()


CENTERPOINT_ONLY: dict[str, Callable[[Path], object]] = {
    "load": cpq.load,
    "detector": cpq.CenterPointDetector.load_from_checkpoint,
    "weights": lambda path: cpq.CenterPointDetector(weights=str(path)).configure_model(),
    "weights_parts": _weights_parts,
}


def test_another_network_than_centerpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    cpq.save(_calibrated(Net()), path)
    message = r"of another network than CenterPoint \(Net\): cpq_train.load\(path, network\) takes it"
    for take in CENTERPOINT_ONLY.values():
        with pytest.raises(cpq.UserError, match=message):
            take(path)
    for command in (
        ["verify", str(path)],
        ["convert", *("--input", str(path), "--output", str(tmp_path / "b.pth"), "--target", "openpcdet")],
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert "of another network than CenterPoint (Net)" in capsys.readouterr().err


def test_describe_says_what_is_not_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class First(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(x.repeat(1, 2, 1, 1)))

    cpq.save(_calibrated(First()), tmp_path / "a.ckpt")
    main(["describe", str(tmp_path / "a.ckpt")])
    said = " ".join(capsys.readouterr().out.split())
    assert "network │ First" in said
    assert "not folded │ norm: it reads no layer's output" in said
