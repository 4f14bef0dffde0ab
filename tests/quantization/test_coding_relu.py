"""ReLUs that make codes: outputs and gradients are those of a network whose ReLUs make none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpq_train.common.kernels import IS_FIT
from cpq_train.quantization.layers import activation
from cpq_train.quantization.layers.activation import CodingReLU, make_plain
from cpq_train.quantization.prepare import prepare, remove_quantizers
from cpq_train.quantization.prepared import frozen, prepared_of
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.ranges.policy import apply_policy, finish_observing, start_observing
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import only_quantized, quantizers_off
from cpq_train.sparse import ResidualAdd

pytestmark = pytest.mark.skipif(not IS_FIT, reason="no Numba, or a processor without fused multiply-add")

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(2, 4, 6, 6, generator=GENERATOR)
BATCHES = [X, *torch.randn(3, 2, 4, 6, 6, generator=GENERATOR)]


class Net(nn.Module):
    """Layers that read what a ReLU makes, as `read` has it."""

    def __init__(self, read: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.relu, self.other, self.add = nn.ReLU(), nn.ReLU(), ResidualAdd()
        self.drop = nn.Dropout(0.5, inplace=True)
        self.read, self.num_passes, self.last = read, 0, None

    def forward(self, x: Tensor) -> Tensor:
        out = self.read(self, self.relu(self.stem(x)))
        self.num_passes += 1
        return out


def _twice(n: Net, y: Tensor) -> Tensor:
    return n.a(y) + n.a(y)


def _written(n: Net, y: Tensor) -> Tensor:
    y += 1
    return n.a(y)


def _written_in_part(n: Net, y: Tensor) -> Tensor:
    y[:, 0] = 0.3
    return n.a(y)


def _written_through_a_view(n: Net, y: Tensor) -> Tensor:
    y.flatten().mul_(0.5)
    return n.a(y)


def _written_between(n: Net, y: Tensor) -> Tensor:
    first = n.a(y)
    y *= 0.5
    return first + n.b(y)


def _written_behind(n: Net, y: Tensor) -> Tensor:
    first = n.a(y)
    y += 1
    return first + y


def _kept(n: Net, y: Tensor) -> Tensor:
    before = y if n.last is None else n.last
    n.last = y.detach()
    return n.a(y) + n.b(before)


def _by_turns(n: Net, y: Tensor) -> Tensor:
    z = n.other(n.c(y)) if n.num_passes % 2 else n.c(n.other(y))
    first, second = (n.a, n.b) if n.num_passes % 3 else (n.b, n.a)
    return first(z) + second(n.other(z))


def _depends_on_data(n: Net, y: Tensor) -> Tensor:
    return n.a(n.relu(n.b(y))) if float(y.sum()) > 150 else n.b(n.relu(n.relu(n.a(y))))


def _without_gradient(n: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = n.a(y) > 0
    return (n.b(y) + n.a(y)) * gate


def _in_inference_mode(n: Net, y: Tensor) -> Tensor:
    with torch.inference_mode():
        gate = n.a(n.other(y)) > 0
    return (n.b(n.other(y)) + n.a(y)) * gate.clone()


def _checkpointed(use_reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    return lambda n, y: checkpoint(lambda t: n.b(n.other(n.a(t))) + n.c(t), y, use_reentrant=use_reentrant)


def _checkpointed_by_turns(n: Net, y: Tensor) -> Tensor:
    def behind(t: Tensor) -> Tensor:
        return n.b(n.other(n.a(t))) + n.c(t)

    return behind(y) if n.num_passes % 2 == 0 else checkpoint(behind, y, use_reentrant=False)


READS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "one": lambda n, y: n.a(y),
    "several": lambda n, y: n.a(y) + n.b(y) + n.c(y),
    "residual": lambda n, y: n.b(n.other(n.add(n.a(y), y))),
    "residual of a ReLU": lambda n, y: n.add(n.relu(n.a(y)), n.other(n.b(y))),
    "residual of itself": lambda n, y: n.add(y, y),
    "float beside": lambda n, y: n.a(y) * torch.sigmoid(y),
    "float before": lambda n, y: torch.tanh(y) + n.a(y) + y.square(),
    "detached": lambda n, y: n.a(y.detach()) + n.b(y),
    "twice": _twice,
    "reused": lambda n, y: n.a(n.relu(n.b(n.relu(n.c(y))))),
    "kept": _kept,
    "by turns": _by_turns,
    "depends on data": _depends_on_data,
    "no gradient": _without_gradient,
    "inference mode": _in_inference_mode,
    "reentrant checkpoint": _checkpointed(True),
    "checkpoint": _checkpointed(False),
    "checkpoint by turns": _checkpointed_by_turns,
    "rows": lambda n, y: n.a(y.transpose(2, 3)) + n.b(y),
}
WRITES: dict[str, Callable[[Net, Tensor], Tensor]] = {  # PyTorch refuses their gradients
    "written": _written,
    "written in part": _written_in_part,
    "written through a view": _written_through_a_view,
    "written between": _written_between,
    "written behind": _written_behind,
    "dropout": lambda n, y: n.a(n.drop(y)),
    "dropout between": lambda n, y: n.a(y) + n.b(n.drop(y)) + n.c(y),
}


def _prepared(
    read: Callable[[Net, Tensor], Tensor], scheme: dict[str, object] | None = None, fold: bool = True
) -> Net:
    network = Net(read)
    prepare(network, Scheme.from_dict({"on_reuse": "one_range", **(scheme or {})}), X, fold)
    with collecting_ranges(network):
        for x in BATCHES[:2]:
            network(x)
    network.num_passes, network.last = 0, None
    return network.train()


def _plain_twin(network: Net) -> Net:
    twin = copy.deepcopy(network)
    make_plain(twin)
    assert not any(isinstance(m, CodingReLU) for m in twin.modules())
    return twin


def _steps(network: Net, around: Callable[[], AbstractContextManager[object]] = nullcontext) -> list[Tensor]:
    """Outputs and gradients of some passes, between which the weights change."""
    found: list[Tensor] = []
    for step, x in enumerate(BATCHES):
        torch.manual_seed(step)
        leaf = x.clone().requires_grad_()
        with around():
            out = network(leaf)
        found.append(out.detach().clone())
        if out.requires_grad:
            network.zero_grad()
            out.square().sum().backward()
            found += [leaf.grad, *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(0.97)
    return found


def _assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What ReLUs made the codes of, from now on."""
    seen: list[Tensor] = []
    real = activation.rectified
    monkeypatch.setattr(activation, "rectified", lambda x, *more: seen.append(x) or real(x, *more))
    return seen


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_training_steps_are_those_of_plain_relus(read: Callable[[Net, Tensor], Tensor]) -> None:
    network = _prepared(read)
    twin = _plain_twin(network)
    _assert_same(_steps(network), _steps(twin))
    assert not len(prepared_of(network).scope.codes)


@pytest.mark.parametrize(
    ("mode", "training"), [(torch.no_grad, True), (torch.inference_mode, True), (torch.inference_mode, False)]
)
@pytest.mark.parametrize("read", {**READS, **WRITES}.values(), ids={**READS, **WRITES})
def test_passes_without_a_gradient(
    read: Callable[[Net, Tensor], Tensor], training: bool, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    network = _prepared(read).train(training)
    twin = _plain_twin(network)
    assert all(map(torch.equal, _steps(network, mode), _steps(twin, mode)))


# Who sees the gradient of a ReLU's output


def _watched(watch: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], Tensor]:
    def read(n: Net, y: Tensor) -> Tensor:
        if y.requires_grad:
            watch(n, y)
        return n.a(y) + n.b(y) * torch.sigmoid(y)

    return read


WATCHES: dict[str, Callable[[Net, Tensor], object]] = {
    "retained": lambda n, y: (y.retain_grad(), n.seen.append(y)),
    "hook that looks": lambda n, y: y.register_hook(lambda grad: n.seen.append(grad.clone())),
    "hook that changes": lambda n, y: y.register_hook(lambda grad: grad * 0.25),
}


@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
def test_gradients_that_are_watched_are_whole(watch: Callable[[Net, Tensor], object]) -> None:
    network = _prepared(_watched(watch))
    twin = _plain_twin(network)
    network.seen, twin.seen = [], []
    _assert_same(_steps(network), _steps(twin))
    seen = [[getattr(t, "grad", None) if t.requires_grad else t for t in n.seen] for n in (network, twin)]
    _assert_same(*seen)


def test_hooks_of_a_relu_see_its_gradient() -> None:
    found = []
    network = _prepared(READS["several"])
    for n in (network, _plain_twin(network)):
        seen: list[Tensor] = []
        n.relu.register_full_backward_hook(lambda _, grads, behind, seen=seen: seen.extend([*grads, *behind]))
        found.append([*_steps(n), *seen])
    _assert_same(*found)


# What else a network goes through


SCHEMES: dict[str, dict[str, object]] = {
    "4 bits": {"bits": 4},
    "16 bits": {"bits": 16},
    "narrow": {"narrow_range": True},
    "dynamic": {"mode": "dynamic"},
    "float8": {"format": "fp8_e4m3"},
}


@pytest.mark.parametrize("read", ["several", "residual", "reused"])
@pytest.mark.parametrize("chosen", SCHEMES.values(), ids=SCHEMES)
def test_numbers_of_every_kind(chosen: dict[str, object], read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _prepared(READS[read], {"defaults": {"input": chosen}})
    twin, seen = _plain_twin(network), _count(monkeypatch)
    _assert_same(_steps(network), _steps(twin))
    is_one_pass = chosen.get("bits") != 16 and "mode" not in chosen and "format" not in chosen
    assert bool(seen) == is_one_pass


@pytest.mark.parametrize("bits", [8, 4])
def test_unsigned_codes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unsigned = {"layers": "[abc]", "input": {"signed": False, "bits": bits}}
    network = _prepared(READS["several"], {"rules": [unsigned]})
    twin, seen = _plain_twin(network), _count(monkeypatch)
    _assert_same(_steps(network), _steps(twin))
    assert seen


@pytest.mark.parametrize("amax", ["moving", "learned"])
@pytest.mark.parametrize("read", ["several", "residual", "reused"])
def test_ranges_that_change(amax: str, read: str) -> None:
    network = _prepared(READS[read])
    apply_policy(network, amax)
    twin = _plain_twin(network)
    for _ in range(2):
        for n in (network, twin):
            if amax == "moving":
                start_observing(n)
        found = [_steps(n) for n in (network, twin)]
        _assert_same(*found)
        for n in (network, twin):
            if amax == "moving":
                finish_observing(n, 0.3)
    for ours, plain in zip(network.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, plain)


SWITCHES: dict[str, Callable[[Net], AbstractContextManager[None]]] = {
    "only one layer": lambda n: only_quantized(n, ["b"]),
    "all but one": lambda n: only_quantized(n, ["a", "c", "add", "stem"]),
    "off": quantizers_off,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("read", ["several", "residual", "reused"])
def test_layers_that_are_switched_off(
    read: str, switch: Callable[[Net], AbstractContextManager[None]]
) -> None:
    network = _prepared(READS[read])
    twin = _plain_twin(network)
    found = []
    for n in (network, twin):
        found.append(_steps(n))
        with switch(n):
            found[-1] += _steps(n)
        found[-1] += _steps(n)
    _assert_same(*found)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "saved elsewhere": torch.autograd.graph.save_on_cpu,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("read", ["several", "residual", "float before"])
def test_steps_inside_a_context(read: str, around: Callable[[], AbstractContextManager[object]]) -> None:
    network = _prepared(READS[read])
    twin = _plain_twin(network)
    _steps(network)
    _steps(twin)
    _assert_same(_steps(network, around), _steps(twin, around))


def test_kept_batchnorm_between() -> None:
    def read(n: Net, y: Tensor) -> Tensor:
        return n.a(n.other(n.norm(n.b(y))))

    class WithNorm(Net):
        def __init__(self, how: Callable[[Net, Tensor], Tensor]) -> None:
            super().__init__(how)
            self.norm = nn.BatchNorm2d(4)

    network = WithNorm(read).eval()
    prepare(network, Scheme.from_dict({}), X, fold=False)
    with collecting_ranges(network):
        network(X)
    network.train()
    twin = _plain_twin(network)
    _assert_same(_steps(network), _steps(twin))


def test_one_pass_makes_the_codes_of_a_shared_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _prepared(READS["several"])
    seen = _count(monkeypatch)
    made: list[Tensor] = []
    real = type(network.a._input_quantizer)._code
    monkeypatch.setattr(type(network.a._input_quantizer), "_code", lambda q, x: made.append(x) or real(q, x))
    for num_passes, num_relus, num_codes in ((1, 0, 2), (2, 1, 3), (3, 2, 4)):
        network(X).sum().backward()
        assert (len(seen), len(made)) == (num_relus, num_codes), num_passes
    network.stem(X)
    network.relu(X)
    with quantizers_off(network):
        network(X)
    assert len(seen) == 2  # a part of a network makes none, nor does one that rounds nothing


def test_each_use_of_a_relu_has_a_reader_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _prepared(READS["reused"])
    seen = _count(monkeypatch)
    network(X)
    network(X)
    readers = {use: reader for (module, use), reader in network.relu.scope.reader_of.items()}
    assert readers == {
        i + 1: layer._input_quantizer for i, layer in enumerate((network.c, network.b, network.a))
    }
    assert len(seen) == 3


def test_copies_and_pickles_of_a_network_after_a_pass() -> None:
    network = _prepared(READS["several"])
    expected = network(X)
    network(X)
    network.read = None
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    network.read = READS["several"]
    for other in copies:
        other.read = READS["several"]
        assert other.relu.scope is prepared_of(other).scope is not network.relu.scope
        assert not other.relu.scope.reader_of
        for _ in range(2):
            assert torch.equal(other(X), expected)


@pytest.mark.parametrize("passes", [1, 2])
def test_outputs_can_be_saved_alone(passes: int) -> None:
    network = _prepared(lambda n, y: n.other(n.a(y))).eval()
    for _ in range(passes):
        with torch.no_grad():
            out = network(X)
    file = io.BytesIO()
    torch.save(out, file)
    plain = io.BytesIO()
    torch.save(out.clone(), plain)
    assert len(file.getvalue()) == len(plain.getvalue())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), out)
    assert not copy.deepcopy(out).__dict__


def test_compiled_after_eager_passes() -> None:
    network = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    prepare(network, Scheme.from_dict({}), X)
    with collecting_ranges(network):
        network(X)
    outputs = [network(X), network(X)]
    torch.compiler.reset()
    outputs.append(torch.compile(network, backend="aot_eager")(X))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_without_quantizers_they_are_plain_again() -> None:
    network = _prepared(READS["several"])
    network(X)
    network(X)
    inplace = nn.ReLU(inplace=True)
    network.more = inplace
    remove_quantizers(network)
    assert {type(m) for m in (network.relu, network.other, inplace)} == {nn.ReLU}
    assert not vars(network.relu).keys() - vars(nn.ReLU()).keys()
    network(X)
    prepare(network, Scheme.from_dict({"on_reuse": "one_range"}), X)
    assert type(network.relu) is CodingReLU
    assert type(inplace) is nn.ReLU


# What a frozen network keeps


def test_weights_are_rounded_and_packed_once_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpq_train.quantization.layers import dense, rounded_weights

    rounded: list[Tensor] = []
    packed: list[Tensor] = []
    for module, name, seen in (
        (rounded_weights, "round_rows", rounded),
        (dense.int8_kernel, "pack", packed),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda t, *m, real=real, seen=seen: seen.append(t) or real(t, *m))
    network = _prepared(READS["several"]).eval()
    # The first layer reads negative numbers, which the kernel does not take.
    num_packed = 3 if dense.int8_kernel.IS_AVAILABLE else 0
    rounded.clear()
    packed.clear()
    with torch.no_grad():
        outputs = [network(X)]
        network(X)
        assert (len(rounded), len(packed)) == (8, 2 * num_packed)
        for _ in range(2):
            with frozen(network):
                outputs += [network(X), network(X)]
            network.b.weight.data.mul_(0.5)
        assert (len(rounded), len(packed)) == (16, 4 * num_packed)
        outputs.append(network(X))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[2], outputs[3])
    assert torch.equal(outputs[3], outputs[4])
    assert not torch.equal(outputs[4], outputs[5])


def test_a_frozen_network_keeps_one_packing_a_layer_whatever_the_shapes() -> None:
    network = _prepared(READS["several"]).eval()
    kept = prepared_of(network).scope.kept
    with frozen(network), torch.no_grad():
        outputs = [network(X[..., :size]) for size in (6, 5, 4, 6, 3)]
        num_kept = len(kept)
        network(X)
        assert len(kept) == num_kept
        assert num_kept <= 3 * 4
    with torch.no_grad():
        assert all(map(torch.equal, outputs, [network(X[..., :size]) for size in (6, 5, 4, 6, 3)]))
