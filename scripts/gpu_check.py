"""Proves on a GPU what was designed without one, and writes the record: docs/gpu.json, and docs/gpu.md of it.

    bash scripts/gpu_check.sh

`gpu_checking/parts.py` says what is run. Ends with exit code 1 where a part failed or numbers differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_checking.guard import FAILED, Part, run_guarded
from gpu_checking.page import page_of, summary_of
from gpu_checking.parts import PARTS
from gpu_checking.setting import ROOT, Setting
from jsonargparse import auto_cli
from machine import describe, settle
from results import table_of
from torch.backends import cudnn

import cpq_train.sparse  # noqa: F401 - first, see `cpq_train.sparse.importing`
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole

RECORD, PAGE = "gpu.json", "gpu.md"
SCHEMA = 1
GIB = 2**30


def main(
    device: Literal["cuda", "cpu"] = "cuda",
    output: Path | None = None,
    budget_s: float = 450.0,
) -> None:
    """Run all parts, print what they found, and write record and page.

    Args:
        device: cuda; or cpu, where everything is small and proves only that the check runs.
        output: Folder of `gpu.json` and `gpu.md`; null is docs, which is for CUDA alone.
        budget_s: Seconds after which no further part begins.

    Raises:
        UserError: There is no CUDA device, or the CPU has no folder to write to.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and this machine has none; accepted: cpu with --output FOLDER")
    if device == "cpu" and output is None:
        raise UserError("device is cpu without an output: docs has what a GPU did; accepted: --output FOLDER")
    settle(1 if device == "cpu" else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        setting = Setting(device, Path(folder), budget_s)
        record = check(setting, PARTS)
    write(record, output or ROOT / "docs")
    print(summary_of(record["parts"]))
    sys.exit(exit_code(record))


def check(setting: Setting, parts: Sequence[Part]) -> dict[str, Any]:
    """Run parts one after the other, and print what each found.

    Returns:
        The record, as plain values.
    """
    start_s = time.perf_counter()
    outcomes = {}
    for part in parts:
        outcome = outcomes[part.name] = run_guarded(part, setting)
        print(f"{part.title}: {outcome.result} {outcome.message} ({outcome.seconds} s)", flush=True)
        print(table_of(outcome.rows), flush=True)
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _commit(),
        "seconds": round(time.perf_counter() - start_s, 1),
        **_machine(setting.device),
        "parts": {name: outcome.document() for name, outcome in outcomes.items()},
    }


def write(record: Mapping[str, Any], folder: Path) -> None:
    """The record, and the page that is made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_whole(folder / PAGE, page_of(record))


def exit_code(record: Mapping[str, Any]) -> int:
    """1 where a part failed or numbers differ."""
    return int(any(outcome["result"] == FAILED for outcome in record["parts"].values()))


def _commit() -> str:
    """Short hash; with "+" where files have changed since, empty where this is no clone."""
    how: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    try:
        named = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **how)
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **how)
    except OSError:
        return ""
    return f"{named.stdout.strip()}{'+' * bool(changed.stdout.strip())}"


def _machine(device: str) -> dict[str, Any]:
    """The device and what it runs, as the page shows them."""
    found = describe(device)
    facts: dict[str, Any] = {"name": found["machine"], "threads": found["threads"]}
    versions = dict(found["versions"])
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "GiB": round(properties.total_memory / GIB, 1),
            "compute capability": f"{properties.major}.{properties.minor}",
            "GPUs": torch.cuda.device_count(),
            "TF32 of convolutions": cudnn.allow_tf32,
            "TF32 of products": torch.backends.cuda.matmul.allow_tf32,
        }
        versions |= {"CUDA": torch.version.cuda, "cuDNN": cudnn.version()}  # type: ignore[no-untyped-call]
    return {"device": facts, "versions": versions}


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
