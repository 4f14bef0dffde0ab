"""What a step costs by arm: time and memory, of forward and backward of the full network."""

from __future__ import annotations

from results import Row, spread
from steps import FLOAT, FLOAT_BF16, LEARNED, PQ, QAT, QAT_BF16, ratios, time_part, weigh

from gpu_checking.guard import Found
from gpu_checking.setting import Setting

ARMS = (FLOAT, FLOAT_BF16, QAT, QAT_BF16, LEARNED, PQ)


def arms_of(setting: Setting) -> tuple[str, ...]:
    """Those that the device can compute."""
    return tuple(arm for arm in ARMS if setting.has_bf16 or arm != QAT_BF16)


def time_steps(setting: Setting) -> Found:
    """Forward and backward of the full network, arms in turn."""
    rows: list[Row] = []
    for batch_size in setting.batch_sizes:
        work = setting.work_on(batch_size)
        measured = time_part(work, "whole", setting.num_rounds, arms_of(setting))
        for arm, times in measured.items():
            against = {f"/ {other}": spread(ratios(measured, arm, other)) for other in (FLOAT_BF16, FLOAT)}
            sizes = {"batch": batch_size, "voxels": work.num_voxels}
            rows.append({"arm": arm, **sizes, "ms": spread(times), **against})
    return Found(rows)


def weigh_steps(setting: Setting) -> Found:
    """Memory of the same steps."""
    rows: list[Row] = []
    for batch_size in setting.batch_sizes:
        peak, kept = weigh(setting.work_on(batch_size), arms_of(setting))
        for arm in peak:
            row: Row = {
                "arm": arm,
                "batch": batch_size,
                "peak, MiB": peak[arm][0],
                "kept for backward, MiB": kept[arm][0],
                "peak / float": peak[arm][0] / peak[FLOAT][0],
            }
            rows.append(row)
    return Found(rows)
