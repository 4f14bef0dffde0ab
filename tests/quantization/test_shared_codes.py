"""Codes that several layers share are those that each of them would make."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.scope import Memo
from cpq_train.quantization.switches import quantizers
from cpq_train.sparse import ResidualAdd

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
MAPS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def _linear() -> nn.Module:
    return nn.Linear(4, 4)


def _conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


class Net(nn.Module):
    """Three layers read what the stem makes, as `read` has it."""

    def __init__(self, read: Callable[[Net, Tensor], Tensor], layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.c = layer(), layer(), layer(), layer()
        self.drop = nn.Dropout(0.5, inplace=True)
        self.read = read
        self.leaves: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, torch.relu(self.stem(x)))


def _prepared(
    read: Callable[[Net, Tensor], Tensor], layer: Callable[[], nn.Module] = _linear, is_shared: bool = True
) -> Net:
    network = Net(read, layer)
    x = X if layer is _linear else MAPS
    prepare(network, Scheme.from_dict({}), x)
    with collecting_ranges(network):
        network(x)
    if not is_shared:
        for quantizer in quantizers(network).values():
            quantizer.num_readers = 1
    return network.train()


def _without_gradient(n: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = n.a(y) > 0
    return (n.b(y) + n.c(y)) * gate


def _in_inference_mode(n: Net, y: Tensor) -> Tensor:
    with torch.inference_mode():
        gate = n.a(y) > 0
    return (n.b(y) + n.c(y)) * gate.clone()


def _with_gradients_on_in_inference_mode(n: Net, y: Tensor) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():
        gate = n.a(y) > 0
    return (n.b(y) + n.c(y)) * gate.clone()


def _same_layer_in_inference_mode(n: Net, y: Tensor) -> Tensor:
    with torch.inference_mode():
        gate = n.a(y) > 0
    return n.a(y) * gate.clone() + n.b(y) + n.c(y)


def _detached(n: Net, y: Tensor) -> Tensor:
    z = y.detach()
    first = n.a(z)
    n.leaves.append(z)
    return first + n.b(z.requires_grad_()) + n.c(z)


def _written(n: Net, y: Tensor) -> Tensor:
    return n.a(y) + n.b(n.drop(y)) + n.c(y)


def _checkpointed(use_reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    def read(n: Net, y: Tensor) -> Tensor:
        both = checkpoint(lambda t: n.a(t) + n.b(t), y, use_reentrant=use_reentrant)
        return n.c(y) + both if use_reentrant else both + n.c(y)

    return read


READS = {
    "no gradient": _without_gradient,
    "inference mode": _in_inference_mode,
    "one layer, inference mode": _same_layer_in_inference_mode,
    "leaf": _detached,
    "reentrant checkpoint": _checkpointed(True),
    "checkpoint": _checkpointed(False),
    "checkpoint behind a reader": lambda n, y: (
        n.c(y) + checkpoint(lambda t: n.a(t) + n.b(t), y, use_reentrant=False)
    ),
}


CASES = [(read, layer) for read in READS.values() for layer in (_linear, _conv)]
NAMES = [f"{name}, {kind}" for name in READS for kind in ("linear", "conv")]


@pytest.mark.parametrize(
    ("read", "layer"),
    [*CASES, (_with_gradients_on_in_inference_mode, _linear)],
    ids=[*NAMES, "inference mode with gradients, linear"],
)
def test_outputs_and_gradients_are_those_of_layers_that_share_nothing(
    read: Callable[[Net, Tensor], Tensor], layer: Callable[[], nn.Module]
) -> None:
    found = []
    for is_shared in (True, False):
        network = _prepared(read, layer, is_shared)
        assert network.a._input_quantizer.is_shared == is_shared
        torch.manual_seed(2)
        out = network(X if layer is _linear else MAPS)
        out.square().sum().backward()
        assert len(prepared_of(network).scope.codes) == 0
        found.append([out, *(t.grad for t in (*network.parameters(), *network.leaves[-1:]))])
    for ours, alone in zip(*found, strict=True):
        assert (ours is None) == (alone is None)
        if ours is not None:
            torch.testing.assert_close(ours, alone)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are rounded to codes, from now on; weights aside."""
    seen: list[Tensor] = []
    real = Quantizer._code

    def counted(quantizer: Quantizer, x: Tensor) -> Coded:
        seen.append(x)
        return real(quantizer, x)

    monkeypatch.setattr(Quantizer, "_code", counted)
    return seen


def _plain(n: Net, y: Tensor) -> Tensor:
    return n.a(y) + n.b(y) + n.c(y)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_tensor_is_rounded_once(
    grad: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = _prepared(_plain).eval()
    seen = _count(monkeypatch)
    with grad():
        network(X)
    assert len(seen) == 2
    with torch.autograd.graph.save_on_cpu():
        network(X)
    assert len(seen) == 2 + 4


def test_another_tensor_is_not_taken_for_the_last() -> None:
    memo, one = Memo(), nn.Identity()
    tensors = [torch.zeros(1), torch.zeros(1)]
    found = [memo.once(one, tensor, object, num_readers=3) for tensor in (*tensors, tensors[1])]
    assert found[0] is not found[1]
    assert found[1] is found[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_written_to_is_another(mode: Callable[[], AbstractContextManager[None]]) -> None:
    outputs = []
    for is_shared in (True, False):
        network = _prepared(_written, is_shared=is_shared)
        torch.manual_seed(2)
        with mode():
            outputs.append(network(X))
    assert torch.equal(*outputs)


def test_quantizers_are_in_the_mode_of_their_layer() -> None:
    network = Net(lambda n, y: n.add(n.a(y), n.c.bias) + n.other(n.b(y), n.c.bias), _linear)
    network.add, network.other = ResidualAdd(), ResidualAdd()
    prepare(network.eval(), Scheme.from_dict({}), X)
    assert network.add._residual_quantizer.is_shared
    assert not any(module.training for module in network.modules())


def test_calibrators_see_what_was_written_in_between() -> None:
    network = _prepared(_written)
    quantizer = network.a._input_quantizer
    quantizer.start_collecting()
    seen: list[Tensor] = []
    quantizer._calibrator.collect = lambda x: seen.append(x.clone())
    torch.manual_seed(2)
    with torch.no_grad():
        network(X)
    assert len(seen) == 2
    assert not torch.equal(*seen)
    assert ((seen[1] == 0) | (seen[1] == 2 * seen[0])).all()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add, self.skips = _linear(), ResidualAdd(), False

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return torch.relu(out if self.skips else self.add(out, x))


def test_codes_are_dropped_behind_their_last_reader() -> None:
    network = nn.Sequential(*(Block() for _ in range(3))).eval()
    prepare(network, Scheme.from_dict({}), X)
    scope = prepared_of(network).scope
    held: list[tuple[int, int]] = []
    network[2].register_forward_hook(lambda *_: held.append((len(scope.codes), len(scope.collected))))
    with torch.no_grad():
        with collecting_ranges(network):
            network(X)
        network(X)
        network[1].skips = True
        network(X)
    assert held == [(0, 0), (0, 0), (1, 0)]
    assert len(scope.codes) == 0
