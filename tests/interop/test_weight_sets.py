"""Raw and averaged weights of one file, written as the hooks of other projects write them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_networks import MMDET3D, OPENPCDET, TINY, foreign_network
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.interop.conventions import MMDET3D_1
from cpq_train.interop.conversion import to_ours
from cpq_train.interop.recognition import conversion_advice
from cpq_train.interop.weight_sets import chosen_weights, weight_sets
from cpq_train.models import CenterPoint


class _Average(nn.Module):
    """mmengine's averaged model: a copy of the network as `module`, and how often it was updated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network
        self.register_buffer("steps", torch.tensor(9))


def _network(value: float) -> nn.Module:
    """A convolution and its BatchNorm, under a name of mmdetection3d's."""
    network = nn.Module()
    network.pts_neck = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for tensor in network.state_dict().values():
        tensor.fill_(value)
    return network


def _mmengine() -> dict[str, Any]:
    """Its EMAHook, before a checkpoint is saved: values of the two change places."""
    content = {
        "state_dict": _network(1.0).state_dict(),
        "ema_state_dict": _Average(_network(2.0)).state_dict(),
    }
    for name in content["ema_state_dict"]:
        if name.startswith("module."):
            short = name.removeprefix("module.")
            content["ema_state_dict"][name], content["state_dict"][short] = (
                content["state_dict"][short],
                content["ema_state_dict"][name],
            )
    return {"meta": {"mmengine_version": "0.10.4"}, **content, "message_hub": {}}


def _mmcv(with_buffers: bool) -> dict[str, Any]:
    """The EMAHook of mmcv (parameters), or of mmdetection (all): buffers, swapped at the end of an epoch."""
    network, average = _network(1.0), _network(2.0)
    values = average.state_dict() if with_buffers else dict(average.named_parameters())
    own = network.state_dict()
    for name, value in values.items():
        network.register_buffer(f"ema_{name.replace('.', '_')}", own[name].clone())
        own[name].copy_(value)
    return {"meta": {"epoch": 20}, "state_dict": network.state_dict(), "optimizer": {}}


def _lightning() -> dict[str, Any]:
    """Its WeightAveraging, on saving."""
    states = {"state_dict": _network(2.0).state_dict(), "current_model_state": _network(1.0).state_dict()}
    return {**states, "averaging_state": {"n_averaged": torch.tensor(9)}, "epoch": 3}


def _beside(key: str, ema_key: str, prefix: str = "") -> dict[str, Any]:
    """Loops that keep the average under a key of its own, its counter among the tensors."""
    average = {f"{prefix}{name}": tensor for name, tensor in _network(2.0).state_dict().items()}
    average["num_updates"] = torch.tensor(9)
    return {key: _network(1.0).state_dict(), ema_key: average, "ema_updates": 9, "ema_decay": None}


WEIGHT = "pts_neck.0.weight"


@pytest.mark.parametrize(
    ("content", "evaluated"),
    [
        (_mmengine(), "ema"),
        (_mmcv(with_buffers=False), "ema"),
        (_mmcv(with_buffers=True), "ema"),
        (_lightning(), "ema"),
        (_beside("state_dict", "state_dict_ema"), "raw"),
        (_beside("model_state", "model_ema", "module."), "raw"),
        (_beside("model_state", "ema_state_dict"), "raw"),
    ],
)
def test_raw_and_averaged_are_told_apart(content: dict[str, Any], evaluated: str) -> None:
    """Raw are 1 and averaged 2, wherever the writer puts them; the first are those where it always looks."""
    for name, value in (("raw", 1.0), ("ema", 2.0)):
        taken = chosen_weights(content, "f.pth", name)  # type: ignore[arg-type]
        assert list(taken.state) == list(_network(0.0).state_dict())
        assert (taken.name, taken.state[WEIGHT].item()) == (name, value)
    assert weight_sets(content, "f.pth")[0].name == evaluated
    said = (
        rf"'f.pth' holds two sets of weights: .*--weights raw or ema .*\(its writer evaluates {evaluated}\)"
    )
    with pytest.raises(UserError, match=said):
        chosen_weights(content, "f.pth", None)


def test_every_tensor_of_the_entry_is_of_one_set() -> None:
    for content in (_mmcv(with_buffers=False), _mmcv(with_buffers=True)):
        for one in weight_sets(content, "f.pth"):
            assert len(one.state) + len(one.left) == len(content["state_dict"])
            assert set(one.left) < set(content["state_dict"])


def test_one_set_has_no_choice() -> None:
    content = {"state_dict": _network(1.0).state_dict(), "ema_state_dict": None, "ema": {"decay": 0.9}}
    for asked in (None, "raw"):
        taken = chosen_weights(content, "f.pth", asked)  # type: ignore[arg-type]
        assert (taken.name, taken.left) == (None, ())
    with pytest.raises(
        UserError, match=r"weights is 'ema', but .*'f.pth' holds one set of weights \(state_dict\)"
    ):
        chosen_weights(content, "f.pth", "ema")


def test_half_an_average_is_refused() -> None:
    content = _beside("state_dict", "model_ema")
    del content["model_ema"][WEIGHT]
    with pytest.raises(UserError, match=f"'f.pth': model_ema lacks {WEIGHT}, so it is no whole set"):
        weight_sets(content, "f.pth")
    content = {**_beside("state_dict", "model_ema"), "ema": _network(2.0).state_dict()}
    with pytest.raises(UserError, match=r"has model_ema and ema: expected one of them"):
        weight_sets(content, "f.pth")


def test_the_average_of_a_whole_network_converts() -> None:
    state: dict[str, Tensor] = dict(foreign_network(MMDET3D, "krsc").state)
    buffers = {f"ema_{n.replace('.', '_')}": t for n, t in state.items() if n.endswith((".weight", ".bias"))}
    own = CenterPoint(TINY).state_dict()
    expected = to_ours(state, MMDET3D_1, own)
    taken = chosen_weights({"state_dict": {**state, **buffers}}, "f.pth", "raw")
    for name, tensor in to_ours(taken.state, MMDET3D_1, own).state.items():
        assert torch.equal(tensor, expected.state[name])


# --- what an error says of a file that was given as a checkpoint of ours


@pytest.mark.parametrize(
    ("content", "name", "text"),
    [
        (
            {"model_state": foreign_network(OPENPCDET, "krsc").state},
            "a b.pth",
            "names are those of openpcdet; convert it first: python -m cpq_train convert --source openpcdet "
            "--input 'DIR/a b.pth' --output 'DIR/a b.ckpt'",
        ),
        (
            {"state_dict": _network(1.0).state_dict()},
            "a.ckpt",
            "convert --source mmdet3d --mmdet3d_version 1 --input DIR/a.ckpt --output DIR/a-converted.ckpt "
            "(0 where mmdetection3d 0.x trained it)",
        ),
        (_mmengine(), "a.pth", "--mmdet3d_version 1 --weights ema --input DIR/a.pth"),
        (
            {"fc.weight": torch.ones(2)},
            "a.pth",
            "(fc.weight, ...) have the names of none that `convert` knows",
        ),
        ({"epoch": 3}, "a.pth", "nor has it weights where `convert` looks"),
    ],
)
def test_what_a_foreign_file_is(content: Any, name: str, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    said = conversion_advice(tmp_path / name).replace(str(tmp_path), "DIR")
    assert text in said
    assert "\n" not in said


def test_a_pickled_network_is_not_run_to_find_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "a.pth")
    assert re.search(r"save its state_dict\(\) alone where", conversion_advice(tmp_path / "a.pth"))
