"""What cannot be quantized right is refused by name, unless a rule leaves it in float."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import spconv.pytorch as spconv
import torch
from networks import images, voxels
from spconv.core import ConvAlgo
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import cpq_train as cpq


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


class Renamed(nn.Conv2d):
    """A subclass that computes what its base does."""


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "circular": (
        lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        "padding_mode 'circular'; accepted: 'zeros'",
    ),
    "code of its own": (
        lambda: Standardized(3, 3, 3),
        "Standardized has code of its own (forward), which would be lost",
    ),
    "parametrized": (
        lambda: weight_norm(nn.Conv2d(3, 3, 3)),
        "its weight is no parameter but computed from others (parametrized, normalised or pruned)",
    ),
}
OFF = {"layers": "bad", "weight": "off", "input": "off"}


class Net(nn.Module):
    def __init__(self, bad: nn.Module) -> None:
        super().__init__()
        self.good, self.bad = nn.Conv2d(3, 3, 3, padding=1), bad

    def forward(self, x: Tensor) -> Tensor:
        return self.bad(self.good(x))


@pytest.mark.parametrize("case", LAYERS)
def test_refused_by_name(case: str) -> None:
    make, why = LAYERS[case]
    network = Net(make()).eval()
    expected = network(images(0)).detach()
    types = [type(module) for module in network.modules()]
    with pytest.raises(
        cpq.UserError, match=rf"cannot be quantized right:\n  bad \(Conv2d\): {re.escape(why)}"
    ):
        cpq.prepare(network, cpq.Scheme.from_dict({}), images(0))
    assert [type(module) for module in network.modules()] == types
    assert torch.equal(network(images(0)), expected)

    cpq.prepare(network, cpq.Scheme.from_dict({"rules": [OFF]}), images(0))
    assert cpq.coverage(network).left_in_float["bad"] == f"refused: {why} (rule 1 (bad))"
    cpq.calibrate(network, [images(0)])
    torch.testing.assert_close(network(images(0)), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_subclass_without_code_of_its_own_is_quantized() -> None:
    network = Net(Renamed(3, 3, 3)).eval()
    cpq.prepare(network, cpq.Scheme.from_dict({}), images(0))
    assert cpq.coverage(network).counts == {"Conv2d": (2, 2)}


def test_a_setting_of_spconv_that_ours_has_not_is_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            same = {"indice_key": "a", "algo": ConvAlgo.Native, "bias": False}
            self.good = spconv.SubMConv3d(4, 4, 3, **same)
            self.bad = spconv.SubMConv3d(4, 4, 3, fp32_accum=True, **same)

        def forward(self, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
            x = self.good(spconv.SparseConvTensor(features, coords, [16, 16, 16], batch_size))
            return self.bad(x).features

    network = Sparse().eval()
    expected = network(*voxels(0))
    with pytest.raises(cpq.UserError, match=r"bad \(SubMConv3d\): it says what sums of half"):
        cpq.prepare(network, cpq.Scheme.from_dict({}), voxels(0))
    assert torch.equal(network(*voxels(0)), expected)
    cpq.prepare(network, cpq.Scheme.from_dict({"rules": [OFF]}), voxels(0))
    assert cpq.coverage(network).counts == {"sparse": (1, 2)}
    assert "fp32_accum True" in cpq.coverage(network).left_in_float["bad"]
