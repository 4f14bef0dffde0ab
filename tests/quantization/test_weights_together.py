"""Weights that are rounded together are those that each layer would round, with the same gradients."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from networks_of_kinds import (
    NETWORKS,
    SCHEMES,
    Results,
    gradients_of,
    network_of,
    prepared,
    random_numbers,
    step,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import as_on_gpu
from cpq_train.quantization.health import Problem
from cpq_train.quantization.layers.rounded_weights import WeightTable
from cpq_train.quantization.prepare import leave_in_float, remove_quantizers
from cpq_train.quantization.prepared import frozen, prepared_of
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.switches import only_quantized, quantized_layers, quantizers_off


@contextmanager
def _each_its_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightTable, "round", lambda table, ranges: {})
        yield


def _assert_equal(together: Results, alone: Results) -> None:
    assert together.keys() == alone.keys()
    for name, found in together.items():
        expected = alone[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert found.shape == expected.shape, name
            assert torch.equal(found, expected), name


def _compared(network: nn.Module, work: Callable[[nn.Module], Results]) -> Results:
    """Does a piece of work on two copies of a network: what it finds is the same."""
    twin = copy.deepcopy(network)
    together = work(network)
    with _each_its_own():
        alone = work(twin)
    _assert_equal(together, alone)
    return together


@pytest.mark.parametrize("amax", ["frozen", "learned"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_and_gradients_are_those_of_layers_that_round_their_own(
    kind: str, scheme: str, amax: str
) -> None:
    network, inputs = network_of(kind, scheme, amax)

    def work(network: nn.Module) -> Results:
        step(network, inputs)  # from the second pass on ReLUs make codes
        network.zero_grad()
        return step(network, inputs)

    found = _compared(network, work)
    assert all(gradient is not None for gradient in found.values())


def test_all_of_them_are_rounded_together() -> None:
    network, inputs = network_of("maps")
    seen: list[int] = []
    scope = prepared_of(network).scope
    network[4].register_forward_hook(lambda *_: seen.append(len(scope.weights)))
    network(*inputs)
    assert seen == [3]
    assert len(scope.weights) == 0


# Layers that take part otherwise


class Heads(nn.Module):
    """Layers of one part of the network, of which a pass uses some, some twice."""

    def __init__(self, read: Callable[[nn.ModuleDict, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleDict({name: nn.Conv2d(3, 3, 3, padding=1) for name in "abc"})
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.heads, x)


X = random_numbers(2, 3, 6, 6)


def _sum(heads: nn.ModuleDict, x: Tensor) -> Tensor:
    return heads["a"](x) + heads["b"](x) + heads["c"](x)


def _heads(read: Callable[[nn.ModuleDict, Tensor], Any] = _sum, amax: str = "frozen") -> Heads:
    network = Heads(_sum)
    prepared(network, (X,), amax=amax)
    network.read = read
    return network


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_a_layer_that_is_not_run_has_no_gradient(amax: str) -> None:
    found = _compared(_heads(lambda n, x: n["a"](x), amax), lambda n: step(n, (X,)))
    assert found["heads.a.weight"] is not None
    assert found["heads.b.weight"] is None
    assert found.get("heads.b._weight_quantizer._log_amax") is None


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_a_layer_that_is_used_twice(amax: str) -> None:
    """Gradients of both uses are added before they are multiplied by the step: a last digit may differ."""
    network = _heads(lambda n, x: n["a"](x) + n["a"](2 * x) + n["b"](x), amax)
    twin = copy.deepcopy(network)
    together = step(network, (X,))
    with _each_its_own():
        alone = step(twin, (X,))
    assert torch.equal(together.pop("output"), alone.pop("output"))
    for name, found in together.items():
        torch.testing.assert_close(found, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_weights_that_are_not_trained(amax: str) -> None:
    network = _heads(amax=amax)
    network.heads["b"].weight.requires_grad_(False)
    found = _compared(network, lambda n: step(n, (X,)))
    assert found["heads.b.weight"] is None
    if amax == "learned":
        assert found["heads.b._weight_quantizer._log_amax"] is not None
    for layer in network.heads.values():
        layer.weight.requires_grad_(False)
    network.zero_grad()
    _compared(network, lambda n: step(n, (X,)))


def test_two_layers_of_one_weight() -> None:
    network = Heads(_sum)
    network.heads["b"].weight = network.heads["a"].weight
    prepared(network, (X,))
    together = step(network, (X,))
    network.zero_grad()
    with _each_its_own():
        alone = step(network, (X,))
    _assert_equal(together, alone)


def test_a_weight_that_is_computed() -> None:
    network = _heads()
    network(X)
    torch.nn.utils.parametrizations.weight_norm(network.heads["a"])
    for _ in range(2):
        network.zero_grad()
        _compared(network, lambda n: step(n, (X,)))
    scope = prepared_of(network).scope
    table = scope.weight_table
    network(X)
    assert scope.weight_table is table


def test_layers_switched_off_and_bypassed() -> None:
    network = _heads()
    for block in (lambda: quantizers_off(network), lambda: only_quantized(network, ["heads.b"])):
        network.zero_grad()
        with block():
            together = step(network, (X,))
            network.zero_grad()
            with _each_its_own():
                _assert_equal(together, step(network, (X,)))
    network.zero_grad()
    _compared(network, lambda n: step(n, (X,)))


def test_one_layer_switched_off() -> None:
    network = _heads()
    network.heads["a"]._weight_quantizer.disable()
    _compared(network, lambda n: step(n, (X,)))


def test_dynamic_ranges_are_not_in_it() -> None:
    scheme = {"rules": [{"layers": "heads.a", "input": {"mode": "dynamic"}}]}
    network = prepared(Heads(_sum), (X,), scheme)
    _compared(network, lambda n: step(n, (X,)))


# Backward passes


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_backward_twice(amax: str) -> None:
    def work(network: nn.Module) -> Results:
        y = network(X)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        return gradients_of(network)

    _compared(_heads(amax=amax), work)


def test_parts_of_the_output_have_backward_passes_of_their_own() -> None:
    def work(network: nn.Module) -> Results:
        for y in network(X):
            y.square().sum().backward()
        return gradients_of(network)

    found = _compared(_heads(lambda n, x: [n[name](x) for name in "ab"]), work)
    assert found["heads.a.weight"] is not None
    assert found["heads.b.weight"] is not None


def test_backward_twice_through_one_layer_is_an_error() -> None:
    y = _heads()(X)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_gradients_are_accumulated() -> None:
    def work(network: nn.Module) -> Results:
        return {**step(network, (X,)), **step(network, (2 * X,))}

    _compared(_heads(), work)


def test_a_weight_may_not_change_before_backward() -> None:
    network = _heads()
    y = network(X)
    with torch.no_grad():
        network.heads["b"].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"Conv2d\(3, 3, .* inplace"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    network, x = _heads(), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_gradients_that_have_gaps() -> None:
    weights = random_numbers(4, 3, 12, 6)

    def work(network: nn.Module) -> Results:
        y = network(X)
        y.backward(weights[::2, :, ::2].transpose(2, 3).transpose(2, 3))
        (y.detach().requires_grad_() * 1).sum().backward()
        return gradients_of(network)

    _compared(_heads(), work)


@pytest.mark.parametrize("kind", ["maps", "channels_last", "groups"])
def test_gradients_lie_as_their_weights_do(kind: str) -> None:
    """Or DDP, whose buckets are such views, would copy them."""
    network, inputs = network_of(kind)
    step(network, inputs)
    for weight in (layer.weight for layer in quantized_layers(network).values()):
        assert weight.grad.stride() == weight.stride()


# Writes


def _between(write: Callable[[nn.Module], None]) -> Callable[[nn.Module], Results]:
    """A step in which the first layer's hook writes to the last layer."""

    def work(network: nn.Module) -> Results:
        handle = network[0].register_forward_hook(lambda *_: write(network[4]))
        found = step(network, NETWORKS["maps"][1]())
        handle.remove()
        return found

    return work


@torch.no_grad()
def _double(layer: nn.Module) -> None:
    layer.weight.mul_(2)


def _replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() / 3)


@pytest.mark.parametrize("write", [_double, _replace])
def test_a_weight_that_is_written_to_in_a_hook_is_rounded_again(write: Callable[[nn.Module], None]) -> None:
    network, _ = network_of("maps")
    plain = step(copy.deepcopy(network), NETWORKS["maps"][1]())
    found = _compared(network, _between(write))
    assert not torch.equal(found["output"], plain["output"])  # type: ignore[arg-type]


def test_a_layer_whose_neighbour_is_written_to_keeps_its_gradient() -> None:
    def work(network: nn.Module) -> Results:
        handle = network.heads["a"].register_forward_hook(lambda *_: _double(network.heads["b"]))
        found = step(network, (X,))
        handle.remove()
        return found

    _compared(_heads(), work)


def test_a_range_that_is_written_to_in_a_hook_counts_from_the_next_pass_on() -> None:
    network, inputs = network_of("maps")
    before = network(*inputs)
    with torch.no_grad():
        handle = network[0].register_forward_hook(
            lambda *_: network[4]._weight_quantizer.scale_amax(torch.tensor(0.5))
        )
        assert torch.equal(network(*inputs), before)
        handle.remove()
        after = network(*inputs)
        with _each_its_own():
            assert torch.equal(network(*inputs), after)
    assert not torch.equal(after, before)


def test_an_update_is_seen_by_the_next_pass() -> None:
    def work(network: nn.Module) -> Results:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            found = step(network, (X,))
            optimizer.step()
        return found

    _compared(_heads(amax="learned"), work)


# Networks that are copied, saved, moved, changed


def test_a_copy_has_tables_of_its_own() -> None:
    network = _heads()
    network(X)
    twin = copy.deepcopy(network)
    assert prepared_of(twin).scope.weight_table is None
    with torch.no_grad():
        twin.heads["a"].weight.mul_(0.5)
    assert not torch.equal(network(X), twin(X))
    assert prepared_of(twin).scope is not prepared_of(network).scope


def test_a_state_dict_is_taken_up() -> None:
    network, other = _heads(), _heads()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    network(X)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    network.load_state_dict(torch.load(buffer))
    assert torch.equal(network(X), other(X))


def test_another_type_is_refused() -> None:
    network = _heads()
    network(X)
    network.double()
    with pytest.raises(UserError, match=r"torch\.float64"):
        network(X.double())
    network.float()
    _compared(network, lambda n: step(n, (X,)))


def test_another_memory_format() -> None:
    network, inputs = network_of("maps")
    network(*inputs)
    network.to(memory_format=torch.channels_last)
    _compared(network, lambda n: step(n, inputs))


def test_a_weight_of_another_size() -> None:
    network = prepared(
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)),
        (random_numbers(4, 5),),
        SCHEMES["by tensor"],
    )
    network(random_numbers(4, 5))
    last = network[2]
    last.weight = nn.Parameter(torch.cat([last.weight.detach(), last.weight.detach()]))
    last.out_features = 6
    assert network(random_numbers(4, 5)).shape == (4, 6)
    _compared(network, lambda n: step(n, (random_numbers(4, 5),)))


def test_parts_on_another_device() -> None:
    """Ranges of several devices are worked out by their quantizers."""
    network = Heads(lambda n, x: n["a"](x) + n["b"](2 * x) + n["c"](3 * x))
    prepared(network, (X,))
    network.read = lambda n, x: n["a"](x)
    before = network(X)
    network.heads["b"].to("meta")
    assert torch.equal(network(X), before)


def test_layers_that_are_left_in_float() -> None:
    network, inputs = network_of("maps")
    network(*inputs)
    leave_in_float(network, [Problem("2._input_quantizer", "ConvTranspose2d", "amax is 0", "1 of 1")])
    assert list(quantized_layers(network)) == ["0", "4"]
    _compared(network, lambda n: step(n, inputs))


def test_a_network_without_quantizers() -> None:
    network, inputs = network_of("maps")
    network(*inputs)
    remove_quantizers(network)
    plain = NETWORKS["maps"][0]()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network(*inputs), plain(*inputs))


def test_ranges_that_are_learned_from_now_on() -> None:
    network, inputs = network_of("maps")
    step(network, inputs)
    apply_policy(network, "learned")
    network.zero_grad()
    found = _compared(network, lambda n: step(n, inputs))
    assert found["4._weight_quantizer._log_amax"] is not None
    apply_policy(network, "frozen")
    network.zero_grad()
    _compared(network, lambda n: step(n, inputs))


# Modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_without_gradients(mode: Callable[[], AbstractContextManager[None]], is_frozen: bool) -> None:
    network, inputs = network_of("maps")

    def work(network: nn.Module) -> Results:
        with frozen(network) if is_frozen else nullcontext(), mode():
            network(*inputs)
            return {"output": network(*inputs).clone()}

    _compared(network, work)
    _compared(network, lambda n: step(n, inputs))


@pytest.mark.parametrize("num_passes", [0, 1])
def test_weights_of_a_frozen_network_have_gradients(num_passes: int) -> None:
    def work(network: nn.Module) -> Results:
        with frozen(network):
            for _ in range(num_passes):
                with torch.no_grad():
                    network(X)
            return step(network, (X,))

    found = _compared(_heads(), work)
    assert all(gradient is not None for gradient in found.values())


def test_gradients_that_are_asked_for_within_a_pass_without() -> None:
    def read(heads: nn.ModuleDict, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return heads["a"](x)

    def work(network: nn.Module) -> Results:
        with torch.no_grad():
            y = network(X)
        y.square().sum().backward()
        return gradients_of(network)

    found = _compared(_heads(read), work)
    assert found["heads.a.weight"] is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_layers_in_a_checkpoint(use_reentrant: bool, amax: str) -> None:
    def read(heads: nn.ModuleDict, x: Tensor) -> Tensor:
        return checkpoint(lambda t: heads["a"](t).relu(), heads["b"](x), use_reentrant=use_reentrant)

    _compared(_heads(read, amax), lambda n: step(n, (X,)))


def test_a_checkpoint_around_the_network() -> None:
    def work(network: nn.Module) -> Results:
        y = checkpoint(network, X, use_reentrant=False)
        y.square().sum().backward()
        return gradients_of(network)

    _compared(_heads(), work)


def test_under_autocast() -> None:
    def work(network: nn.Module) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return step(network, (X,))

    _compared(_heads(), work)


@pytest.mark.parametrize("where", [nullcontext, as_on_gpu])
def test_nothing_comes_in_but_zeros_where_no_voxel_is(
    where: Callable[[], AbstractContextManager[None]],
) -> None:
    network, (features, indices, batch_size) = network_of("sparse")
    with where():
        y = network(features[:0], indices[:0], batch_size)
        y.sum().backward()
    assert y.shape == (0, 3)
    for layer in quantized_layers(network).values():
        if layer.weight.grad is not None:
            assert not layer.weight.grad.any()


# What is kept


@pytest.mark.parametrize("where", [nullcontext, as_on_gpu])
@pytest.mark.parametrize(("kind", "num_kept"), [("maps", 0), ("sparse", 1)])
def test_what_was_read_is_not_kept_for_backward(
    kind: str, num_kept: int, where: Callable[[], AbstractContextManager[None]]
) -> None:
    """Its codes are, and behind a backward pass not even these; what a float pooling reads is."""
    network, inputs = network_of(kind)
    with where():
        network(*inputs)
        seen: list[weakref.ref[Tensor]] = []
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
        loss = network(*inputs).sum()
        gc.collect()
        assert len(seen) >= 2
        assert sum(tensor() is not None for tensor in seen) == num_kept
        loss.backward()
        gc.collect()
        held = [node.of for node in _nodes(loss) if hasattr(node, "of")]
    assert held
    for of in held:
        assert not getattr(of, "made", None)
        assert not hasattr(of, "sums")  # which knows the codes


def _nodes(loss: Tensor) -> set[Any]:
    """Of autograd, behind a tensor."""
    found: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found


def test_tables_are_made_once() -> None:
    network, inputs = network_of("maps")
    network(*inputs)
    scope = prepared_of(network).scope
    tables = scope.range_table, scope.weight_table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(network, inputs)
    assert (scope.range_table, scope.weight_table) == tables
