"""Memory by layer against counting by hand."""

import gc
import weakref

import torch
from profiled_networks import SparseNetwork, sparse_input
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cpq_train.profiling.allocation import CountedTensors
from cpq_train.profiling.instrument import Function
from cpq_train.profiling.memory import MemoryObserver, MemoryRow, kept_buffers, observing_memory

CPU = torch.device("cpu")
RULEBOOK = Function("cpq_train.sparse.convolution", "find_or_build", "rulebook")


def _rows(observer: MemoryObserver) -> dict[str, MemoryRow]:
    return {row.name: row for row in observer.rows()}


def test_dense_layers_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 16, 16)
    map_bytes = 2 * 8 * 16 * 16 * 4
    with observing_memory(network, CPU) as observer:
        y = network(x)
        observer.finish()
    rows = _rows(observer)
    assert list(rows) == ["0", "1", "2", "3"]
    conv, norm, relu, last = rows.values()
    assert (conv.parameter_bytes, norm.parameter_bytes, last.parameter_bytes) == (4 * 224, 64, 4 * 36)
    assert (conv.buffer_bytes, norm.buffer_bytes) == (0, 2 * 8 * 4 + 8)
    # A convolution keeps its input, BatchNorm also the mean and deviation of the batch, ReLU its output,
    # which the last convolution would keep too.
    statistics = 2 * 8 * 4
    assert conv.saved_bytes == x.nbytes
    assert norm.saved_bytes == map_bytes + statistics
    assert (relu.saved_bytes, last.saved_bytes) == (map_bytes, 0)
    assert [row.output_bytes for row in rows.values()] == [map_bytes] * 3 + [y.nbytes]
    assert [row.peak_bytes for row in rows.values()] == [
        map_bytes,
        map_bytes + statistics,
        map_bytes,
        y.nbytes,
    ]
    # In the ReLU: the convolution's output is kept, BatchNorm's goes with the ReLU's end.
    assert observer.peak_bytes() == 3 * map_bytes + statistics


def test_dense_layers_as_torch_profiler_has_them() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = network(x)
    with observing_memory(network, CPU) as observer:
        kept = network(x)
        observer.finish()
    theirs = {event.key: event.cpu_memory_usage for event in recorded.key_averages()}
    ours = [row.peak_bytes for row in observer.rows()]
    assert ours == [theirs["aten::conv2d"], theirs["aten::batch_norm"], theirs["aten::relu"]]
    assert kept.requires_grad


def test_without_gradients_nothing_is_kept() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ReLU())
    x, map_bytes = torch.randn(2, 3, 16, 16), 2 * 8 * 16 * 16 * 4
    with torch.no_grad(), observing_memory(network, CPU) as observer:
        network(x)
        observer.finish()
    assert all(row.saved_bytes == 0 for row in observer.rows())
    # The input of a layer goes when the next one has its own: two maps at a time.
    assert observer.peak_bytes() == 2 * map_bytes


def test_sparse_layers_by_hand() -> None:
    network, (features, coords) = SparseNetwork(), sparse_input()
    with observing_memory(network, CPU, [RULEBOOK]) as observer:
        out = network(features, coords)
        observer.finish()
    rows = _rows(observer)
    num_voxels, kernel = len(features), 27
    # There is room for a pair of rows for every voxel and kernel offset, in int32. The two submanifold layers
    # share them.
    rulebook_bytes = 2 * kernel * num_voxels * 4
    assert rows["first"].saved_bytes == features.nbytes + rulebook_bytes
    assert rows["second"].saved_bytes == num_voxels * 8 * 4
    assert rows["first"].output_bytes == num_voxels * 8 * 4
    assert rows["strided"].output_bytes == out.nbytes
    assert rows["strided"].saved_bytes == num_voxels * 8 * 4 + rulebook_bytes
    assert rows["first:rulebook"].peak_bytes >= rulebook_bytes
    assert rows["second:rulebook"].peak_bytes == 0
    assert rows["first"].peak_bytes >= rows["first:rulebook"].peak_bytes
    assert rows["strided"].parameter_bytes == 8 * 16 * 27 * 4


def test_a_function_and_a_container_are_told_apart() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(x).exp()

    network = nn.Sequential(Scaled())
    with observing_memory(network, CPU) as observer:
        network(torch.zeros(10, requires_grad=True))
        observer.finish()
    rows = _rows(observer)
    assert rows["0.relu"].saved_bytes == 40
    assert (rows["0"].kind, rows["0"].saved_bytes) == ("Scaled", 40)


def test_a_shared_parameter_counts_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    with observing_memory(network, CPU) as observer:
        network(torch.zeros(1, 4))
        observer.finish()
    rows = _rows(observer)
    assert (rows["0"].parameter_bytes, rows["1"].parameter_bytes) == (80, 16)


def test_counted_tensors_come_and_go() -> None:
    outside = torch.zeros(100)
    with CountedTensors() as counted:
        tensor = torch.zeros(1000)
        view, of_outside = tensor.view(10, 100), outside[:10]
        assert counted.allocated() == 4000
        del tensor
        assert counted.allocated() == 4000
        view += 1
        assert counted.take_peak() == 8000 - 4000
        del view
        assert counted.allocated() == 0
        assert counted.take_peak() == 4000
        assert counted.take_peak() == 0
        assert len(of_outside) == 10


def test_what_was_counted_is_let_go() -> None:
    outside = torch.zeros(10)
    with CountedTensors() as counted:
        inside = outside + 1
    reference = weakref.ref(counted)
    del counted
    gc.collect()
    assert reference() is None
    assert len(inside) == 10


def test_gradients_are_the_same_while_observed() -> None:
    network, inputs = SparseNetwork(), sparse_input()
    network(*inputs).sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with observing_memory(network, CPU) as observer:
        loss = network(*inputs).sum()
        observer.finish()
    loss.backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_buffers_are_put_back() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with kept_buffers(network):
        network(torch.randn(8, 3))
        assert not torch.equal(network[0].running_mean, before["0.running_mean"])
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])
