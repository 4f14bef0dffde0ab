"""What a quantizer remembers of a range follows the range."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.prepared import frozen, prepared_of
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.range_table import RangeTable
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme
from cpq_train.quantization.switches import quantizers


def _values(quantizer: Quantizer, amax: float) -> torch.Tensor:
    quantizer._amax.fill_(amax)
    return quantizer(torch.tensor([0.3, 5.0]))


def test_a_new_amax_is_noticed() -> None:
    quantizer = Quantizer(QuantizerScheme())
    assert _values(quantizer, 1.0)[1] == 1.0
    assert _values(quantizer, 4.0)[1] == 4.0
    quantizer.load_state_dict({"_amax": torch.tensor(2.0)})
    assert quantizer(torch.tensor(5.0)) == 2.0


def test_training_goes_on_after_inference_mode() -> None:
    layer = nn.Conv2d(3, 3, 3)
    quantize_layer(layer, LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme()))
    x = torch.randn(1, 3, 6, 6)
    with collecting_ranges(layer):
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


# Of a whole network


def _network(amax: str = "frozen") -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    prepare(network, Scheme.from_dict({}), X)
    with collecting_ranges(network):
        network(X)
    apply_policy(network, amax)
    return network


X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Quantizer]:
    """The quantizers whose static range is worked out, from now on."""
    seen: list[Quantizer] = []
    alone, together = Quantizer._static_range, RangeTable.work_out
    monkeypatch.setattr(Quantizer, "_static_range", lambda q: seen.append(q) or alone(q))
    monkeypatch.setattr(RangeTable, "work_out", lambda t: seen.extend(t.quantizers) or together(t))
    return seen


def test_a_range_is_worked_out_once_in_a_pass_and_once_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network()
    layer = network[0]
    network.forward = lambda x: layer(x) + layer(x)
    seen = _count(monkeypatch)
    for _ in range(2):
        network(X)
    assert len(seen) == len(set(seen)) * 2 == 8
    seen.clear()
    with frozen(network), frozen(network):
        for _ in range(3):
            network(X)
    assert len(seen) == len(set(seen)) == 4
    network(X)
    assert len(seen) == 8


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_writes_that_torch_does_not_count_are_noticed_by_the_next_pass(amax: str) -> None:
    network = _network(amax)
    before = network(X).detach()
    quantizer = network[0]._input_quantizer
    source = quantizer._amax if amax == "frozen" else quantizer._log_amax
    version = source._version
    source.data.copy_(source * 0.5 if amax == "frozen" else source - 0.7)
    assert source._version == version
    assert not torch.equal(network(X), before)
    assert float(quantizer.amax) == float(source if amax == "frozen" else source.exp())


WRITES: dict[str, Callable[[nn.Sequential], object]] = {
    "0.weight": lambda n: n[0].weight.mul_(2),
    "0.bias": lambda n: n[0].bias.add_(1),
    "2._input_quantizer._amax": lambda n: n[2]._input_quantizer.set_amax(torch.tensor(1.0)),
    "0._weight_quantizer._amax": lambda n: n[0]._weight_quantizer.scale_amax(torch.tensor(2.0)),
    "2.weight": lambda n: setattr(n[2], "weight", nn.Parameter(n[2].weight.clone())),
    "0._input_quantizer._amax": lambda n: n.load_state_dict(n.state_dict()),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_inside_a_block_are_errors(name: str) -> None:
    network, block = _network(), ExitStack()
    block.enter_context(frozen(network))
    text = rf"were written to while their network is frozen, the first of them {name}; accepted: inside"
    with torch.no_grad():
        network(X)
        WRITES[name](network)
        with pytest.raises(UserError, match=text):
            network(X)
        with pytest.raises(UserError, match=text):
            block.close()
    network(X)  # behind the block it is no error any more


def test_writes_are_noticed_where_no_pass_of_the_network_follows() -> None:
    network, block = _network(), ExitStack()
    block.enter_context(frozen(network))
    network(X)
    nn.init.zeros_(network[0].weight)
    network[0](X)
    with pytest.raises(UserError, match=r"1 tensors were written to .* the first of them 0\.weight"):
        block.close()
    assert not prepared_of(network).scope.is_open


def test_an_error_inside_a_block_is_not_replaced() -> None:
    network = _network()
    with pytest.raises(KeyError), frozen(network):
        raise KeyError(nn.init.zeros_(network[0].weight))
    assert not prepared_of(network).scope.is_open


def test_a_learned_range_cannot_be_written_inside_a_block() -> None:
    network = _network("learned")
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    block = ExitStack()
    block.enter_context(frozen(network))
    for q in quantizers(network).values():
        q.amax  # noqa: B018  # reading it brings the buffer up to date, which is no write
    network(X).sum().backward()
    network(X)
    optimizer.step()
    with pytest.raises(UserError, match="_log_amax"):
        network(X)
    with pytest.raises(UserError, match="_log_amax"):
        block.close()


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    network = _network()
    scope = prepared_of(network).scope
    with pytest.raises(RuntimeError):
        network(X[:, :2])
    assert not scope.is_open
    assert not scope.ranges


def test_gradients_inside_a_block_that_began_in_inference_mode() -> None:
    network = _network()
    with frozen(network):
        with torch.inference_mode():
            network(X)
        network(X).sum().backward()
    assert network[0].weight.grad.isfinite().all()


def test_a_part_of_a_network_remembers_nothing() -> None:
    network = _network()
    network[0](X)
    assert not prepared_of(network).scope.ranges


def test_a_float_network_can_be_frozen() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with frozen(network):
        network[0].weight.data.mul_(2)
        network(X)
