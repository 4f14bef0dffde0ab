"""The metrics of a run as `metrics.csv` in its directory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from cpq_train.loggers.csv_rows import Row, append_rows, read_rows, rows_before, write_rows

METRICS_CSV = "metrics.csv"


class CSVRunLogger(Logger):
    """Writes a row of `metrics.csv` as soon as it is logged; a resumed run goes on with the file.

    Lightning's own CSVLogger deletes the file of the run that is resumed, and holds rows back that a killed
    process then loses. Only a fit is logged: what `validate` finds is in `metrics.json`.

    Attributes:
        run_dir: The run directory; the command line sets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.run_dir = Path()
        self._columns: list[str] | None = None

    @property
    def file(self) -> Path:
        """The log."""
        return self.run_dir / METRICS_CSV

    @property
    @override
    def name(self) -> str:
        """No folder of that name is made."""
        return ""

    @property
    @override
    def version(self) -> str:
        """No folder of that name is made."""
        return ""

    @property
    @override
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.run_dir)

    @rank_zero_only
    def start(self, global_step: int) -> None:
        """Open the log; rows of a former run from `global_step` on are dropped, for they come again."""
        kept = rows_before(self.file, global_step)
        self._columns = sorted({name for row in kept for name, value in row.items() if value != ""})
        write_rows(self.file, self._columns, kept)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Add a row; columns that are new become empty fields of the rows before it."""
        if self._columns is None:
            return
        row: Row = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        row["step"] = step
        if row.keys() <= set(self._columns):
            append_rows(self.file, self._columns, [row])
        else:
            self._columns = sorted({*self._columns, *row})
            write_rows(self.file, self._columns, [*read_rows(self.file), row])

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""
