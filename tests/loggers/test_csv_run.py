"""The CSV log of a run: what a killed and resumed run leaves equals what an undisturbed one leaves."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from cpq_train.loggers import CSVRunLogger

ROWS: list[tuple[dict[str, Any], int]] = [
    ({"lr": 0.1}, 0),
    ({"epoch": 0, "train/loss": torch.tensor(2.0)}, 0),
    ({"lr": 0.2}, 1),
    ({"epoch": 0, "train/loss": 1.5}, 1),
    ({"epoch": 0, "val/NDS": 0.4}, 1),
    ({"lr": 0.1}, 2),
    ({"epoch": 1, "train/loss": 1 / 3}, 2),
    ({"epoch": 1, "val/NDS": 0.5}, 2),
]


def _log(run_dir: Path, rows: list[tuple[dict[str, Any], int]], global_step: int = 0) -> Path:
    logger = CSVRunLogger()
    logger.run_dir = run_dir
    logger.start(global_step)
    for metrics, step in rows:
        logger.log_metrics(metrics, step)
    return logger.file


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_a_row_per_call_and_columns_that_grow(tmp_path: Path) -> None:
    table = _table(_log(tmp_path, ROWS))
    assert list(table[0]) == ["epoch", "lr", "step", "train/loss", "val/NDS"]
    for row, (metrics, step) in zip(table, ROWS, strict=True):
        assert {k: float(v) for k, v in row.items() if v} == {
            "step": step,
            **{k: float(v) for k, v in metrics.items()},
        }


@pytest.mark.parametrize("num_logged", range(len(ROWS) + 1))
@pytest.mark.parametrize("global_step", [0, 1, 2])
def test_resumed_equals_undisturbed(num_logged: int, global_step: int, tmp_path: Path) -> None:
    """Killed after any row; resumed from any step whose checkpoint can exist by then."""
    before = [row for row in ROWS if row[1] < global_step]
    whole = _log(tmp_path / "whole", ROWS).read_text()
    file = _log(tmp_path / "killed", ROWS[: max(num_logged, len(before))])
    assert _log(tmp_path / "killed", [row for row in ROWS if row[1] >= global_step], global_step) == file
    assert file.read_text() == whole


def test_a_torn_last_row_is_dropped(tmp_path: Path) -> None:
    """A full disk may end the file anywhere."""
    whole = _log(tmp_path / "whole", ROWS[:5]).read_text()
    file = _log(tmp_path / "torn", ROWS[:5])
    file.write_text(file.read_text() + ",0.")
    _log(tmp_path / "torn", [], 2)
    assert file.read_text() == whole


def test_a_new_fit_starts_a_new_log(tmp_path: Path) -> None:
    file = _log(tmp_path, ROWS)
    _log(tmp_path, [])
    assert not file.exists()
    _log(tmp_path, ROWS[:1])
    assert _table(file) == [{"lr": "0.1", "step": "0"}]


def test_only_a_fit_is_logged(tmp_path: Path) -> None:
    """`validate` logs too where a logger is named, but the file belongs to the fit."""
    file = _log(tmp_path, ROWS)
    logger = CSVRunLogger()
    logger.run_dir = tmp_path
    logger.log_metrics({"val/NDS": 0.9}, 0)
    assert len(_table(file)) == len(ROWS)
