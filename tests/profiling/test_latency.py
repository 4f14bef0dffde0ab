"""Where time goes, on a clock that moves by one second whenever it is read."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from profiled_networks import ResNet50, SparseNetwork, sparse_input
from spconv.pytorch import ops
from spconv.pytorch.cppcore import TorchSpconvMatmul
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cpq_train.profiling import latency
from cpq_train.profiling.instrument import Function, Observer, Part, observing, parts_of
from cpq_train.profiling.latency import PassTimes, Stopwatch, measure_latency, summarise
from cpq_train.profiling.trace import write_trace
from cpq_train.quantization.costs import count_costs
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.scheme import Scheme
from cpq_train.sparse import convolution, reference_kernels

CPU = torch.device("cpu")
RULEBOOK = Function("cpq_train.sparse.convolution", "find_or_build", "rulebook")


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(ticks)))


def _time(network: nn.Module, run: Callable[[], object], *functions: Function) -> PassTimes:
    watch = Stopwatch(CPU)
    with observing(network, watch, functions):
        watch.start()
        run()
        return watch.stop()


@pytest.mark.usefixtures("ticking")
def test_every_layer_takes_one_tick_and_the_rest_is_unattributed() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.ReLU()))
    times = _time(network, lambda: network(torch.zeros(1, 2)))
    assert {part.name: ms for part, ms in times.own.items()} == {"0": 1000, "1.0": 1000, "1.1": 1000}
    # Ten borders of five modules, and the two of the whole: eleven ticks.
    assert times.whole_ms == 11_000


@pytest.mark.usefixtures("ticking")
def test_a_rulebook_is_not_time_of_its_layer() -> None:
    network, inputs = SparseNetwork(), sparse_input()
    times = _time(network, lambda: network(*inputs), RULEBOOK)
    own = {part.name: ms for part, ms in times.own.items()}
    assert own["first:rulebook"] == own["second:rulebook"] == own["strided:rulebook"] == 1000
    assert own["first"] == 2000  # before and behind its rulebook
    assert {part.kind for part in times.own} == {"SubMConv3d", "SparseConv3d", "rulebook"}


@pytest.mark.usefixtures("ticking")
def test_a_method_of_a_class_is_a_function_too() -> None:
    """Of the parts that are named; whoever has the class calls the watched one, bound to its object."""
    network, original = nn.Sequential(nn.Dropout(), nn.Flatten()), nn.Dropout.forward
    watch, dropping = Stopwatch(CPU), Function("torch.nn:Dropout", "forward", "dropping")
    with observing(network.eval(), watch, [dropping], {"0": Part("0", "Dropout")}):
        watch.start()
        assert network(torch.ones(1, 2)).tolist() == [[1, 1]]
        times = watch.stop()
    assert {part.name: ms for part, ms in times.own.items()} == {"0": 2000, "0:dropping": 1000}
    assert nn.Dropout.forward is original


@pytest.mark.usefixtures("ticking")
def test_a_layer_called_twice_is_one_row() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(relu, nn.Tanh(), relu)
    times = _time(network, lambda: network(torch.zeros(1)))
    assert {part.name: ms for part, ms in times.own.items()} == {"0": 2000, "1": 1000}


def test_nothing_is_left_behind() -> None:
    network, original = SparseNetwork(), convolution.find_or_build
    inputs = sparse_input()
    for arguments, raises in ((inputs, nullcontext()), ((None, None), pytest.raises(AttributeError))):
        with raises:
            _time(network, lambda given=arguments: network(*given), RULEBOOK)
        assert convolution.find_or_build is original
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_observers_stop_in_any_order() -> None:
    network, inputs, original = SparseNetwork(), sparse_input(), convolution.find_or_build
    first, second = Stopwatch(CPU), Stopwatch(CPU)
    a, b = observing(network, first, [RULEBOOK]), observing(network, second, [RULEBOOK])
    for context, watch in ((a, first), (b, second)):
        context.__enter__()
        watch.start()
    network(*inputs)
    a.__exit__(None, None, None)
    assert first.stop().own.keys() == second.stop().own.keys()
    network(*inputs)
    b.__exit__(None, None, None)
    assert convolution.find_or_build is original


def test_quantizers_belong_to_their_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    prepare(network, Scheme.from_dict({"defaults": {"input": {"mode": "dynamic"}}}), torch.ones(1, 3, 5, 5))
    parts = parts_of(network)
    assert list(parts) == ["", "0", "1"]
    assert parts["0"].is_layer
    assert parts["0"].kind == "QuantConv2d"
    assert not parts[""].is_layer


def test_a_module_with_parameters_and_children_has_a_row() -> None:
    parts = parts_of(nn.Sequential(nn.MultiheadAttention(4, 2)))
    assert parts["0"].is_layer
    assert parts["0.out_proj"].is_layer


def test_summary_is_of_medians_with_their_spread() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = (part for part in parts_of(network).values() if part.is_layer)
    passes = [PassTimes({first: a, second: b}, a + b + 1) for a, b in ((1, 2), (3, 4), (9, 5))]
    found = summarise(passes, [4.0, 5.0, 6.0], {"1": 3e6})
    slow, fast = found.layers
    assert (slow.name, slow.time.ms, slow.time.min_ms, slow.time.max_ms) == ("1", 4, 2, 5)
    assert (fast.name, fast.time.ms, fast.share) == ("0", 3, 3 / 8)
    assert slow.gflop_per_s == 2 * 3e6 / 4e-3 / 1e9
    (kind,) = found.kinds
    assert (kind.calls, kind.time.ms, kind.macs) == (2, 7, 3e6)
    assert (found.whole.ms, found.plain.ms, found.unattributed.ms) == (8, 5, 1)
    assert found.unattributed_share == 1 / 8


def test_warm_up_is_not_measured() -> None:
    calls: list[bool] = []
    is_observed = False

    @contextmanager
    def observe(watch: Observer) -> Iterator[None]:
        nonlocal is_observed
        is_observed = True
        yield
        is_observed = False

    found = measure_latency(lambda: calls.append(is_observed), observe, CPU, {}, num_passes=2, num_warm_up=3)
    assert calls == [False] * 3 + [False, True] * 2
    assert found.layers == []


TRANSPOSED = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Conv2d(6, 6, 3, groups=3))
LINEAR = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Linear(6, 7))


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        pytest.param(ResNet50(), (torch.zeros(2, 3, 64, 64),), id="resnet"),
        pytest.param(TRANSPOSED, (torch.zeros(1, 4, 8, 8),), id="transposed"),
        pytest.param(LINEAR, (torch.zeros(2, 3, 8),), id="linear"),
        pytest.param(SparseNetwork(), sparse_input(), id="sparse"),
    ],
)
def test_macs_are_those_of_torch(
    network: nn.Module, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts a multiply-accumulate twice; it sees spconv's convolutions as products of matrices."""
    monkeypatch.setattr(ops, "TorchSpconvMatmul", TorchSpconvMatmul)  # ours pads small products, with zeros

    @torch.no_grad()
    def run() -> int:
        network.eval()(*inputs)
        return 1

    with reference_kernels(), FlopCounterMode(display=False) as counter:
        run()
    layers = [name for name, part in parts_of(network).items() if part.is_layer]
    macs = count_costs(network, layers, run)
    assert 2 * sum(cost.num_macs for cost in macs.values()) == counter.get_total_flops() > 0


def test_a_trace_names_the_layers(tmp_path: Path) -> None:
    network, inputs = SparseNetwork(), sparse_input()
    path = tmp_path / "trace.json"
    write_trace(path, lambda: network(*inputs), lambda observer: observing(network, observer, [RULEBOOK]))
    events = {event["name"]: event for event in json.loads(path.read_text())["traceEvents"] if "dur" in event}
    layer, rulebook = events["first (SubMConv3d)"], events["first:rulebook (rulebook)"]
    assert layer["ts"] <= rulebook["ts"]
    assert rulebook["ts"] + rulebook["dur"] <= layer["ts"] + layer["dur"] + 1
    assert any(name.startswith("aten::") for name in events)


@pytest.mark.cuda
def test_cuda_events() -> None:
    device = torch.device("cuda")
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()).to(device)
    watch = Stopwatch(device)
    with observing(network, watch):
        watch.start()
        network(torch.zeros(8, 3, 256, 256, device=device))
        times = watch.stop()
    assert 0 < sum(times.own.values()) <= times.whole_ms
