"""What RangeWatch says of small networks, against numbers worked out by hand or by NumPy in fp64."""

import math
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_networks import calibrated, dense_batches, run, scheme, sparse_batches
from torch import Tensor, nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.prepare import prepare_as
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.calibration import static_ranges
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.ranges.watch import MAX_SAMPLE, RangeReading, RangeWatch, stride_for
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.switches import quantized_layers, quantizers_off
from cpq_train.quantization.wiring import Wiring
from cpq_train.sparse import ResidualAdd

X = [[-3.0, -1.0, 0.0, 0.5], [0.25, 1.0, 2.0, 2.5]]
WEIGHT = [[0.5, -1.0], [2.0, 0.3]]


def _layer(input_scheme: QuantizerScheme, amax: float | None = 2.0) -> nn.Conv2d:
    """A 1 x 1 convolution of two channels with 4-bit weights per channel."""
    layer = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHT).view(2, 2, 1, 1))
    quantize_layer(layer, LayerScheme(QuantizerScheme(bits=4, granularity="per_channel"), input_scheme))
    if amax is not None:
        layer._input_quantizer.set_amax(torch.tensor(amax))
    return layer


def _x() -> Tensor:
    """(1, 2, 1, 4)."""
    return torch.tensor(X).view(1, 2, 1, 4)


def _start(network: nn.Module) -> dict[str, Tensor]:
    return {name: amax.clone() for name, amax in static_ranges(network).items()}


def _watched(
    network: nn.Module, *inputs: object, start: dict[str, Tensor] | None = None
) -> dict[str, RangeReading]:
    watch = RangeWatch(network, _start(network) if start is None else start)
    for x in inputs:
        run(network, x)
    watch.finish()
    assert not any(m._forward_pre_hooks for m in quantized_layers(network).values())
    return {reading.quantizer: reading for reading in watch.readings()}


def test_an_input_by_hand() -> None:
    """Of 8 values -3, 2.5 are beyond 2; 2 is not."""
    layer = _layer(QuantizerScheme())
    start = _start(layer)
    layer._input_quantizer.set_amax(torch.tensor(0.5))
    before = _watched(layer, _x(), start=start)["_input_quantizer"]
    assert before[1:5] == (0.5, 2.0, 3.0, 5 / 8)
    assert before.drift == -2.0
    assert math.isnan(before.sqnr_db)
    layer._input_quantizer.set_amax(torch.tensor(2.0))
    assert _watched(layer, _x(), start=start)["_input_quantizer"][1:5] == (2.0, 2.0, 3.0, 2 / 8)


def test_negative_values_of_an_unsigned_input_are_clipped() -> None:
    reading = _watched(_layer(QuantizerScheme(signed=False)), _x())["_input_quantizer"]
    assert reading.clipped_share == 3 / 8  # -3, -1 and 2.5


def test_a_weight_by_hand() -> None:
    """Channel ranges of 1 and 2; steps of 1/7 and 2/7, so that only 0.5 and 0.3 are not on the grid."""
    layer = _layer(QuantizerScheme())
    start = {**_start(layer), "_weight_quantizer": torch.tensor([2.0, 16.0]).view(2, 1, 1, 1)}
    reading = _watched(layer, _x(), start=start)["_weight_quantizer"]
    assert reading.amax == pytest.approx(math.sqrt(2), rel=1e-12)
    assert reading.start_amax == pytest.approx(math.sqrt(32), rel=1e-12)
    assert reading.drift == pytest.approx((math.log2(1 / 2) + math.log2(2 / 16)) / 2, rel=1e-12)
    assert reading.live_amax == pytest.approx(math.sqrt(2), rel=1e-12)
    assert reading.clipped_share == 0.0
    noise = (0.5 - 4 / 7) ** 2 + (0.3 - 2 / 7) ** 2  # 3.5 rounds to the even 4
    assert reading.sqnr_db == pytest.approx(10 * math.log10((0.25 + 1 + 4 + 0.09) / noise), rel=1e-5)


def test_weights_that_outgrew_their_range_are_clipped() -> None:
    layer = _layer(QuantizerScheme())
    with torch.no_grad():
        layer.weight.mul_(1.5)
    reading = _watched(layer, _x())["_weight_quantizer"]
    assert reading.clipped_share == 2 / 4
    assert reading.live_amax / reading.amax == pytest.approx(1.5)


def test_a_channel_of_zeros_has_no_part_in_the_mean() -> None:
    layer = _layer(QuantizerScheme())
    with torch.no_grad():
        layer.weight[0] = 0.0
    layer._weight_quantizer.set_amax_from(layer.weight)
    reading = _watched(layer, _x())["_weight_quantizer"]
    assert reading[1:4] == pytest.approx((2.0, 2.0, 2.0), rel=1e-12)


def test_a_dynamic_quantizer_has_only_a_live_range() -> None:
    dynamic = _layer(QuantizerScheme(mode="dynamic"), amax=None)
    readings = _watched(dynamic, _x())
    name, amax, start, live, share, sqnr = readings["_input_quantizer"]
    assert (name, live) == ("_input_quantizer", 3.0)
    assert all(map(math.isnan, (amax, start, share, sqnr, readings["_input_quantizer"].drift)))


def test_float_layers_and_quantizers_that_are_off_are_skipped() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1), _layer(QuantizerScheme()))
    assert set(_watched(network, _x())) == {"1._input_quantizer", "1._weight_quantizer"}
    with quantizers_off(network):
        assert _watched(network, _x()) == {}


def test_what_saw_nothing_has_no_live_range() -> None:
    for inputs in ((), (_x()[:0],)):
        reading = _watched(_layer(QuantizerScheme()), *inputs)["_input_quantizer"]
        assert reading.amax == 2.0
        assert math.isnan(reading.live_amax)
        assert math.isnan(reading.clipped_share)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("policy", ["frozen", "learned"])
def test_networks_equal_numpy(kind: str, policy: str) -> None:
    """What enters each layer is caught by hooks of the test's own."""
    network = calibrated(kind).network
    start = _start(network)
    apply_policy(network, policy)
    with torch.no_grad():
        for quantizer in network.modules():
            if isinstance(quantizer, Quantizer):
                if policy == "learned":
                    quantizer._log_amax.sub_(math.log(1.25))
                else:
                    quantizer.scale_amax(torch.tensor(0.8))
    batch = {"dense": dense_batches, "sparse": sparse_batches}[kind](1)[0]
    caught: dict[str, np.ndarray] = {}
    layers = {name: m for name, m in network.named_modules() if hasattr(m, "_input_quantizer")}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda m, args, out, name=name: caught.update(
                {name: getattr(args[0], "features", args[0]).detach().numpy()}
            )
        )
    readings = _watched(network, batch, start=start)
    assert len(readings) == 2 * len(layers)
    for name, layer in layers.items():
        reading, amax = readings[f"{name}._input_quantizer"], layer._input_quantizer.amax.item()
        assert reading.drift == pytest.approx(math.log2(0.8), rel=1e-5)
        assert reading.amax == pytest.approx(amax)
        assert reading.live_amax == np.abs(caught[name]).max()
        assert reading.clipped_share == pytest.approx(np.mean(np.abs(caught[name]) > amax))
        weight, rounded = layer.weight.detach(), layer._weight_quantizer(layer.weight).detach()
        noise = ((weight - rounded).double() ** 2).sum()
        expected = 10 * math.log10((weight.double() ** 2).sum() / noise)
        assert readings[f"{name}._weight_quantizer"].sqnr_db == pytest.approx(expected)
        assert readings[f"{name}._weight_quantizer"].clipped_share > 0


def test_a_shared_tensor_counts_once_and_both_sides_of_an_add_count() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
            self.quant_add = ResidualAdd()

        def forward(self, x: Tensor) -> Tensor:
            return self.quant_add(self.conv1(x), x) + self.conv2(x)

    network = Block()
    nn.init.constant_(network.conv1.weight, 3.0)
    x = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    for shared in (["conv1", "conv2", "quant_add:residual"], ["conv1", "conv2"]):
        copy = Block()
        copy.load_state_dict(network.state_dict())
        prepare_as(copy, scheme(), Wiring(one_tensor=(tuple(shared),)))
        for quantizer in copy.modules():
            if isinstance(quantizer, Quantizer) and quantizer.is_per_tensor:
                quantizer.set_amax(torch.tensor(3.5))
        readings = _watched(copy, x)
        inputs = {n: r for n, r in readings.items() if n.endswith("_input_quantizer")}
        assert set(inputs) == {"conv1._input_quantizer", "quant_add._input_quantizer"}
        assert inputs["conv1._input_quantizer"][3:5] == (4.0, 1 / 4)
        # The branch is 3, 6, 9 and 3 x 3.5, the identity x; on its own the add's quantizer sees both.
        expected = 3 / 4 if "quant_add:residual" in shared else (3 + 1) / 8
        assert inputs["quant_add._input_quantizer"].clipped_share == expected


@pytest.mark.parametrize(
    "shape", [(2, 64, 90, 90), (3, 2, 128, 128), (65536,), (65537, 3), (1, 1), (700001,)]
)
def test_a_sample_meets_every_channel(shape: tuple[int, ...]) -> None:
    num = math.prod(shape)
    stride = stride_for(num)
    sample = np.arange(0, num, stride)
    assert len(sample) <= MAX_SAMPLE
    assert len(sample) >= min(num, MAX_SAMPLE // 4)
    for axis, length in enumerate(shape):
        counts = np.bincount(np.unravel_index(sample, shape)[axis], minlength=length)
        assert counts.min() >= 0.7 * counts.max() or length > 1000


def test_a_large_map_is_sampled_and_its_largest_value_is_not_missed() -> None:
    layer = _layer(QuantizerScheme())
    x = torch.randn(1, 2, 300, 300, generator=torch.Generator().manual_seed(0))
    x[0, 0, 17, 23] = 50.0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        reading = _watched(layer, x.contiguous(memory_format=memory_format))["_input_quantizer"]
        assert reading.live_amax == 50.0
        assert reading.clipped_share == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=0.1)


def _on_rank(rank: int, port: int, output: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=20), world_size=2, rank=rank)
    torch.save([tuple(r) for r in _readings_of(slice(rank, rank + 1))], output / f"{rank}.pt")
    dist.destroy_process_group()


def _readings_of(samples: slice) -> list[RangeReading]:
    batch = torch.cat([_x(), 2 * _x()])[samples]
    return list(_watched(_layer(QuantizerScheme()), batch).values())


def test_two_ranks_say_what_one_says_of_both_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_on_rank, (port, tmp_path), nprocs=2, start_method="fork")
    alone = _readings_of(slice(0, 2))
    assert alone[0][3:5] == (6.0, (2 + 3) / 16)
    for rank in range(2):
        for mine, reading in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert mine[0] == reading.quantizer
            assert mine[1:] == pytest.approx(tuple(reading[1:]), nan_ok=True, rel=1e-12)


def test_closing_takes_the_hooks_off() -> None:
    layer = _layer(QuantizerScheme())
    watch = RangeWatch(layer, _start(layer))
    assert layer._forward_pre_hooks
    watch.close()
    assert not layer._forward_pre_hooks
