"""What quantization-aware training costs: a QAT step over a float step, beside pytorch-quantization's layers.

    python scripts/bench/qat_overhead.py

`steps.py` says what is timed, and how. Ranges are frozen; all arms have BatchNorm folded and the dense layers
in channels_last memory. A ratio is taken within a round, and the median over the rounds is reported. On the
CPU, memory is what the tensors that operations make take. Ends with exit code 1 where a bound is passed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lidar_like import new_batch
from machine import settle
from results import Row, spread, write_rows
from steps import (
    FLOAT,
    FLOAT_BF16,
    FLOAT_SAME,
    NETWORKS,
    PARTS,
    PQ,
    QAT,
    QAT_BF16,
    Measured,
    Workload,
    config_of,
    ratios,
    time_part,
    weigh,
)

from cpq_train.common.errors import UserError
from cpq_train.common.progress import progress
from cpq_train.profiling.latency import clock_of

BATCH_SIZES = {"full": 1, "quickstart": 4}
PEAK, KEPT = "peak memory", "kept for backward"


@dataclass(frozen=True)
class Bound:
    """The largest accepted ratio of an arm to another.

    Attributes:
        part: A key of `PARTS`, or peak memory.
        arm: The numerator.
        against: The denominator.
        by_network: Network -> the ratio; others have none.
    """

    part: str
    arm: str
    against: str
    by_network: Mapping[str, float]


BOUNDS = (
    Bound("whole", QAT, FLOAT, {"full": 0.70, "quickstart": 0.60}),
    Bound("sparse", QAT, FLOAT, {"full": 0.45, "quickstart": 0.35}),
    Bound("backbone", QAT, FLOAT, {"full": 0.82}),
    Bound("head", QAT, FLOAT, {"full": 0.83}),
    Bound("whole", QAT, FLOAT_SAME, {"full": 0.85, "quickstart": 0.85}),
    Bound("dense", QAT_BF16, FLOAT_BF16, {"full": 1.2}),
    Bound("evaluation", QAT, FLOAT, {"full": 0.40}),
    Bound(PEAK, QAT, FLOAT, {"full": 1.05, "quickstart": 1.05}),
    *(Bound(part, QAT, PQ, {"full": 1.0, "quickstart": 1.0}) for part in ("dense", "sparse", "whole")),
)

Found = dict[tuple[str, str], Measured]
"""Network and part -> arm -> milliseconds, or MiB, in each round."""


def main(
    networks: tuple[str, ...] = tuple(NETWORKS),
    parts: tuple[str, ...] = tuple(PARTS),
    num_rounds: int = 3,
    threads: int = 1,
    device: str = "auto",
    scheme: Path | None = None,
    root: Path | None = None,
    version: str = "v1.0-trainval",
) -> None:
    """Measure, and put two tables into the results of this machine.

    Args:
        networks: full (0.1 m, one sample of ten sweeps) and quickstart (batch of four, the sweeps of its
            configuration), either or both.
        parts: Of `PARTS`; memory is measured with whole.
        num_rounds: Rounds that count; one more warms up. A multiple of twice the arms puts each everywhere.
        threads: 1 measures CPU time, more measure wall time. Ignored on CUDA.
        device: cpu, cuda, or auto for CUDA where there is one.
        scheme: What to quantize; null is INT8.
        root: nuScenes or simulated data to take samples from; without it they are made up.
        version: Version of the data under `root`.
    """
    _check("networks", networks, tuple(NETWORKS))
    _check("parts", parts, tuple(PARTS))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settle(threads)
    found: Found = {}
    voxels = {}
    with progress("measuring", len(networks) * len(parts) * (num_rounds + 1)) as advance:
        for name in networks:
            config, num_sweeps = config_of(name)
            batch = new_batch(config, num_sweeps, BATCH_SIZES[name], root, version)
            work = Workload.of(config, batch, device, scheme)
            voxels[name] = work.num_voxels
            for part in parts:
                found[name, part] = time_part(work, part, num_rounds, done=lambda: advance(1))
            if "whole" in parts:
                found[name, PEAK], found[name, KEPT] = weigh(work)
    context = {"clock": clock_of(torch.device(device)).name, "rounds": num_rounds}
    bounds = bounds_met(found)
    write_rows("qat_overhead", _rows(found, voxels), device, **context)
    write_rows("qat_overhead_bounds", bounds, device, **context)
    sys.exit(0 if all(row["holds"] == "yes" for row in bounds) else 1)


def _check(option: str, values: tuple[str, ...], accepted: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in accepted]
    if unknown:
        raise UserError(f"{option}: got {unknown[0]!r}, accepted: {', '.join(accepted)}")


def _rows(found: Found, voxels: Mapping[str, int]) -> list[Row]:
    """A row a network and part: the float step, and the ratios of the other arms to it."""
    return [
        {
            "network": f"{network}, {voxels[network]:,} voxels",
            "part": part,
            "float": spread(measured[FLOAT]),
            "unit": "MiB" if part in (PEAK, KEPT) else "ms",
            **{
                f"{arm}, ratio": _ratio(measured, arm, FLOAT) if arm in measured else None
                for arm in PARTS["whole"]
                if arm != FLOAT
            },
        }
        for (network, part), measured in found.items()
    ]


def bounds_met(found: Found) -> list[Row]:
    """What became of every bound whose part was measured."""
    rows: list[Row] = []
    for bound in BOUNDS:
        for network, limit in bound.by_network.items():
            if (network, bound.part) in found:
                ratio = _ratio(found[network, bound.part], bound.arm, bound.against)
                rows.append(
                    {
                        "network": network,
                        "part": bound.part,
                        "ratio": f"{bound.arm} / {bound.against}",
                        "reached": ratio,
                        "bound": limit,
                        "holds": "yes" if ratio["median"] <= limit else "no",
                    }
                )
    return rows


def _ratio(measured: Measured, arm: str, against: str) -> dict[str, float]:
    return spread(ratios(measured, arm, against))


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
