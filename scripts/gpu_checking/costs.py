"""What a step costs by arm: time and memory, of forward and backward of the full network."""

from __future__ import annotations

from functools import partial

from results import Row, spread
from steps import FLOAT, FLOAT_BF16, LEARNED, PQ, QAT, QAT_BF16, Workload, ratios, time_part, weigh

from gpu_checking.guard import Found, each
from gpu_checking.setting import Setting

ARMS = (FLOAT, FLOAT_BF16, QAT, QAT_BF16, LEARNED, PQ)


def arms_of(setting: Setting) -> tuple[str, ...]:
    """Those that the device can compute."""
    return tuple(arm for arm in ARMS if setting.has_bf16 or arm != QAT_BF16)


def time_steps(setting: Setting) -> Found:
    """Forward and backward of the full network, arms in turn."""
    rows: list[Row] = []
    wrong: list[str] = []
    for batch_size in setting.batch_sizes:
        work = setting.work_on(batch_size)
        able, failed = each(arms_of(setting), partial(_step_once, work))
        wrong += failed
        measured = time_part(work, "whole", setting.num_rounds, tuple(able))
        for arm, times in measured.items():
            against = {f"/ {other}": spread(ratios(measured, arm, other)) for other in (FLOAT_BF16, FLOAT)}
            sizes = {"batch": batch_size, "voxels": work.num_voxels}
            rows.append({"arm": arm, **sizes, "ms": spread(times), **against})
    return Found(rows, wrong)


def weigh_steps(setting: Setting) -> Found:
    """Memory of the same steps."""
    rows: list[Row] = []
    wrong: list[str] = []
    for batch_size in setting.batch_sizes:
        work = setting.work_on(batch_size)
        found, failed = each(arms_of(setting), partial(_weigh_one, work))
        wrong += failed
        for arm, (peak, kept) in found.items():
            row: Row = {
                "arm": arm,
                "batch": batch_size,
                "peak, MiB": peak,
                "kept for backward, MiB": kept,
                "peak / float": peak / found[FLOAT][0],
            }
            rows.append(row)
    return Found(rows, wrong)


def _step_once(work: Workload, arm: str) -> None:
    time_part(work, "whole", 0, (arm,))


def _weigh_one(work: Workload, arm: str) -> tuple[float, float]:
    peak, kept = weigh(work, (arm,))
    return peak[arm][0], kept[arm][0]
