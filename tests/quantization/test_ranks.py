"""Calibration over two ranks equals that of one, bit for bit."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.calibrators.collectors import new_collector
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.ranges.calibration import collecting_ranges, static_ranges
from cpq_train.quantization.ranks import check_equal_over_ranks
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme

METHODS = ("max", "percentile", "mse", "entropy")
Work = Callable[[int, int], object]


def _rank(rank: int, port: int, work: Work, output: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=20), world_size=2, rank=rank)
    torch.save(work(rank, 2), output / f"{rank}.pt")
    dist.destroy_process_group()


def _on_two_ranks(work: Work, output: Path) -> list[object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, work, output), nprocs=2, start_method="fork")
    return [torch.load(output / f"{rank}.pt") for rank in range(2)]


def _batches(num: int) -> list[Tensor]:
    """Of magnitudes that grow by 30 from batch to batch, with zeros and exact powers of two."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 8, 8, generator=generator).relu() * 30.0**i for i in range(num)]
    batches[0][0, 0, 0, 0] = 4.0
    return batches


def _calibrated(method: str, batches: list[Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    layer = nn.Conv2d(3, 4, 3)
    nn.init.ones_(layer.weight)
    scheme = QuantizerScheme(method=method, percentile=99.0)
    quantize_layer(layer, LayerScheme(QuantizerScheme(granularity="per_channel"), scheme))
    with collecting_ranges(layer):
        for batch in batches[rank::world_size]:
            layer(batch)
    return static_ranges(layer)


@pytest.mark.parametrize("num_batches", [1, 5])
def test_two_ranks_calibrate_as_one(num_batches: int, tmp_path: Path) -> None:
    """With one batch, the second rank has none."""
    batches = _batches(num_batches)

    def work(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
        return {method: _calibrated(method, batches, rank, world_size) for method in METHODS}

    alone = work(0, 1)
    for of_rank in _on_two_ranks(work, tmp_path):
        for method in METHODS:
            for name, amax in alone[method].items():
                torch.testing.assert_close(of_rank[method][name], amax, rtol=0, atol=0)
    assert len({float(ranges["_input_quantizer"]) for ranges in alone.values()}) > 2 or num_batches == 1


def test_what_one_rank_saw_is_unfit_on_both(tmp_path: Path) -> None:
    """NaN, infinity, negative values and nothing at all survive the reduction, whichever rank saw them."""
    cases = ([torch.nan, 1.0], [torch.inf], [-2.0, 1.0], [])

    def work(rank: int, world_size: int) -> list[tuple[str, str] | None]:
        found = []
        for method in METHODS:
            for case in cases:
                for unlucky in range(world_size):
                    collector = new_collector(QuantizerScheme(method=method, signed=False))
                    collector.collect(torch.tensor(case if rank == unlucky else [3.0] if case else []))
                    collector.reduce(torch.device("cpu"))
                    found.append(collector.problem())
        return found

    first, second = _on_two_ranks(work, tmp_path)
    assert first == second
    expected = ("NaN", "infinite", "negative values down to -2;", "nothing")
    for i, (problem, affected) in enumerate(first):
        assert problem.startswith(expected[i // 2 % len(cases)])
        assert affected == ("some of 3", "some of 2", "1 of 3", "0 of 0")[i // 2 % len(cases)]


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    def work(rank: int, world_size: int) -> str:
        ranges = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5), "nan": torch.tensor(torch.nan)}
        check_equal_over_ranks(ranges)
        ranges["b"] = torch.tensor(0.5 + rank * 2.0**-24)
        try:
            check_equal_over_ranks(ranges)
        except UserError as error:
            return str(error)
        return ""

    for message in _on_two_ranks(work, tmp_path):
        header, _, row = message.splitlines()
        assert header == "1 quantizers differ between ranks:"
        assert " ".join(row.split()) == "b differs from rank 0 on rank 1 1 of 2"
