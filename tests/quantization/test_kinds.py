"""What kind a layer is, why it is refused, and the way to a quantized layer and back."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from cpq_train.quantization.layers import (
    QUANTIZED,
    kind_of,
    quantize_layer,
    unquantize_layer,
    why_refused,
)
from cpq_train.quantization.scheme import KINDS, LayerScheme, QuantizerScheme
from cpq_train.sparse import ResidualAdd, SubMConv3d

INT8 = LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme())


class Named(nn.Conv2d):
    """A subclass that only fixes arguments."""

    gain = 2.0

    def __init__(self) -> None:
        super().__init__(4, 6, 3)


class Halved(nn.Conv2d):
    def half_of_the_channels(self) -> int:
        return self.out_channels // 2


class Measured(nn.Linear):
    @property
    def norm(self) -> torch.Tensor:
        return self.weight.norm()


class Scaled:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


class Before(Scaled, nn.Conv2d):
    """Has it from a class in front of the known one."""


class Turned:
    def _load_from_state_dict(self, *args: object) -> None: ...


class Behind(nn.Conv3d, Turned):
    """Has it from a class behind the known one; that of nn.Module is called all the same."""


class Subtracted(ResidualAdd):
    def forward(self, branch: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        return branch - identity


class Standardized(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


class Padded(nn.Conv1d):
    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return super()._conv_forward(nn.functional.pad(input, (1, 0)), weight, bias)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _with_own_forward() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    return layer


def _parametrized() -> nn.Module:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("plain", QUANTIZED)
def test_the_kind_is_the_name_of_the_class(plain: type[nn.Module]) -> None:
    assert plain.__name__ in KINDS
    assert QUANTIZED[plain].kind == plain.__name__


def test_kinds() -> None:
    layer = Named()
    assert (kind_of(layer), why_refused(layer)) == ("Conv2d", "")
    quantize_layer(layer, INT8)
    assert (kind_of(layer), why_refused(layer)) == ("Conv2d", "")
    assert kind_of(SubMConv3d(3, 4, 3)) == "SubMConv3d"
    for other in (nn.ReLU(), nn.ConvTranspose1d(3, 4, 2), nn.LSTM(3, 4), nn.BatchNorm2d(3), nn.Module()):
        assert kind_of(other) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "padding_mode 'circular'; accepted"),
        (lambda: Standardized(3, 4, 3), "Standardized has code of its own (forward), which would be lost"),
        (lambda: Padded(3, 4, 3), "Padded has code of its own (_conv_forward)"),
        (lambda: Halved(3, 4, 3), "Halved has code of its own (half_of_the_channels)"),
        (lambda: Measured(3, 4), "Measured has code of its own (norm)"),
        (lambda: Before(3, 4, 3), "Before has code of its own (__call__)"),
        (lambda: Behind(3, 4, 3), "Behind has code of its own (_load_from_state_dict)"),
        (Subtracted, "Subtracted has code of its own (forward)"),
        (_with_own_forward, "Linear has code of its own (forward)"),
        (_parametrized, "its weight is no parameter but computed"),
        (lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), "its weight is no parameter but computed"),
        (lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 3)), "its weight is no parameter but"),
        (lambda: nn.utils.weight_norm(nn.Conv3d(3, 4, 3)), "its weight is no parameter but computed"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 4), "bias", 1), "its bias is no parameter but computed"),
        (lambda: nn.Linear(3, 4).half(), "its weight is torch.float16; accepted: torch.float32"),
        (lambda: nn.ConvTranspose2d(3, 4, 2).double(), "its weight is torch.float64; accepted"),
        (lambda: nn.LazyLinear(4), "its weight has no shape before the first call"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_refused(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    assert kind_of(layer) in KINDS
    assert reason in why_refused(layer)


@pytest.mark.parametrize("way", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_subclass_comes_back(way: Callable[[nn.Module], nn.Module]) -> None:
    layer = Named()
    before = {**vars(layer)}
    quantize_layer(layer, INT8)
    assert kind_of(layer) == "Conv2d"
    layer = way(layer)
    assert type(layer) is QUANTIZED[nn.Conv2d]
    unquantize_layer(layer)
    assert type(layer) is Named
    assert layer.gain == 2.0
    assert vars(layer).keys() == before.keys()
    assert not layer._modules
