"""The report over arms as tables: in the console and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from cpq_train.console import table_console
from cpq_train.evaluation.metrics_file import Document
from cpq_train.evaluation.protocol import RANGE_BINS_M, THRESHOLDS_M, TP_ERRORS
from cpq_train.files import write_whole
from cpq_train.nuscenes import DETECTION_CLASSES

_NONE = "n/a"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def print_report(report: Document) -> None:
    """Print the headline tables."""
    console = table_console()
    for table in _headline(report):
        rich_table = RichTable(title=table.title, title_justify="left")
        for column, name in enumerate(table.header):
            rich_table.add_column(
                name, justify="left" if column == 0 else "right", no_wrap=column == 0, overflow="fold"
            )
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
    for note in _notes(report):
        console.print(f"  {note}")


def write_markdown(path: Path, report: Document) -> None:
    """Write the whole report; the file appears only when it is whole."""
    dataset = report["dataset"]
    parts = [
        "# Comparison of arms",
        f"{dataset['root_name']} {dataset['version']}, split {dataset['split']}, "
        f"{dataset['num_samples']} samples, the same post-processing for all arms. "
        f"Intervals: {report['interval_method']}; differences are paired.",
        *(_markdown(table) for table in _headline(report)),
        *(f"- {note}" for note in _notes(report)),
        *(f"![Detections from above]({name})" for name in report["pictures"]),
        *(_markdown(table) for table in (_per_class(report), *_errors_per_class(report), _per_range(report))),
        _markdown(_checkpoints(report)),
    ]
    write_whole(path, "\n\n".join(parts) + "\n")


def _markdown(table: Table) -> str:
    lines = [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _headline(report: Document) -> list[Table]:
    return [table for table in (_scores(report), _gaps(report), _coverage(report)) if len(table.header) > 1]


def _scores(report: Document) -> Table:
    errors = [f"m{error}" for error in TP_ERRORS]
    rows = [
        [
            _title(run),
            _with_interval(run["metrics"]["mAP"], run["confidence"]["mAP"]),
            _with_interval(run["metrics"]["NDS"], run["confidence"]["NDS"]),
            *(_number(run["metrics"][error]) for error in errors),
        ]
        for run in report["runs"]
    ]
    return Table("Scores", ["arm", "mAP", "NDS", *errors], rows)


def _gaps(report: Document) -> Table:
    rows = [
        [
            _title(run),
            *(_with_interval(gap["value"], gap["interval"], "+.4f") for gap in run["gap_to_float"].values()),
            *(_number(share["value"], ".0%") for share in run["ptq_loss_won_back"].values()),
        ]
        for run in report["runs"]
    ]
    header = [
        "arm",
        "mAP gap to float",
        "NDS gap to float",
        "PTQ loss in mAP won back",
        "PTQ loss in NDS won back",
    ]
    return Table("Against float", header, rows)


def _coverage(report: Document) -> Table:
    kinds = list(dict.fromkeys(kind for run in report["runs"] for kind in run["coverage"]))
    rows = [
        [_title(run), *("/".join(map(str, run["coverage"].get(kind, [_NONE]))) for kind in kinds)]
        for run in report["runs"]
    ]
    return Table("Layers quantized, of all", ["arm", *kinds], rows)


def _notes(report: Document) -> list[str]:
    """Why a share of the PTQ loss is not given."""
    return [
        f"{run['name']}, PTQ loss in {metric} won back: {share['reason']}."
        for run in report["runs"]
        for metric, share in run["ptq_loss_won_back"].items()
        if run["arm"] == "qat" and share["reason"]
    ]


def _per_class(report: Document) -> Table:
    rows = [
        [name, *(_number(run["per_class"][name]["AP"]["mean"]) for run in report["runs"])]
        for name in DETECTION_CLASSES
    ]
    thresholds = ", ".join(f"{threshold:g}" for threshold in THRESHOLDS_M)
    return Table(f"AP per class, mean over {thresholds} m", ["class", *map(_title, report["runs"])], rows)


def _errors_per_class(report: Document) -> list[Table]:
    return [
        Table(
            f"{error} per class",
            ["class", *map(_title, report["runs"])],
            [
                [name, *(_number(run["per_class"][name][error]) for run in report["runs"])]
                for name in DETECTION_CLASSES
            ],
        )
        for error in TP_ERRORS
    ]


def _per_range(report: Document) -> Table:
    bins = [f"{lower:g}-{upper:g}" for lower, upper in RANGE_BINS_M]
    rows = [
        [_title(run), *(_number(run["per_range"][name]["mAP"]) for name in bins)] for run in report["runs"]
    ]
    return Table("mAP per distance from the vehicle", ["arm", *(f"{name} m" for name in bins)], rows)


def _checkpoints(report: Document) -> Table:
    rows = [
        [_title(run), f"`{run['checkpoint']['path']}`", f"`{run['checkpoint']['sha256'][:12]}`"]
        for run in report["runs"]
    ]
    return Table("Checkpoints", ["arm", "file", "SHA-256"], rows)


def _title(run: Document) -> str:
    """The arm, and the run where its name says more."""
    arm, name = str(run["arm"]), str(run["name"])
    return arm if arm == name else f"{arm} ({name})"


def _number(value: float | None, form: str = ".4f") -> str:
    return _NONE if value is None else format(value, form)


def _with_interval(value: float | None, interval: Any, form: str = ".4f") -> str:
    if value is None or interval is None:
        return _number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
