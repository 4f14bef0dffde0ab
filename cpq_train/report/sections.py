"""What a report says, once: sections of tables, notes and pictures that every form of the report renders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.gaps import HEADLINE, NO_NDS
from cpq_train.evaluation.lost_objects import Counts
from cpq_train.evaluation.metrics_file import UNKNOWN, Document
from cpq_train.evaluation.protocol import THRESHOLDS_M
from cpq_train.evaluation.reliability import NUM_BINS
from cpq_train.report.checks import check_table
from cpq_train.report.costs import cost_notes, cost_tables
from cpq_train.report.deployed import WHAT_IT_SHOWS, engine_table
from cpq_train.report.tables import NONE, Table, code, number
from cpq_train.report.training_costs import WHAT_TRAINING_COSTS, training_cost_tables


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: short name, the same as that of its pictures.
        title: heading.
        text: what is shown and how to read it.
        tables: tables; those of a headline section are printed too.
        notes: remarks below the tables.
        pictures: file and caption of each picture.
        is_headline: whether it belongs on the console.
    """

    name: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    is_headline: bool = False


def subtitle(report: Document) -> str:
    """What was compared, in a sentence or two."""
    dataset, unknown = report["dataset"], _of_unknown_postprocessing(report)
    but = f" but {', '.join(unknown)}, of which it is unknown" if unknown else ""
    return (
        f"{dataset['root_name']} {dataset['version']}, split {dataset['split']}, "
        f"{dataset['num_samples']} samples, the same post-processing for all arms{but}. "
        f"Intervals: {report['interval_method']}; differences are paired."
    )


def sections(report: Document) -> list[Section]:
    """The sections of a report that have something to say."""
    parts = [
        Section("scores", "Scores", "", [scores_table(report)], _about_scores(report), is_headline=True),
        Section("gaps", "Against float", _GAPS, [_gaps(report)], _notes(report), is_headline=True),
        Section(
            "cost",
            "Layers, size and speed",
            "",
            cost_tables(report),
            cost_notes(report),
            is_headline=True,
        ),
        Section("deployed", "Deployed", WHAT_IT_SHOWS, [engine_table(report)], is_headline=True),
        Section("checks", "Checks", _CHECKS, [check_table(report)], is_headline=True),
        Section("bev", "From above", _BEV),
        Section("classes", "Classes", "", [_per_class(report), *_errors_per_class(report)]),
        Section(
            "range", "Distance from the vehicle", _RANGE, [_per_range(report), *_errors_per_range(report)]
        ),
        Section("confidence", "Calibration of confidence", _CONFIDENCE, [_calibration(report)]),
        Section("lost", "Objects lost and won", _LOST, _lost_objects(report)),
        Section("quantizers", "Quantizers", "", _drifts(report)),
        Section("training", "What training cost by layer", WHAT_TRAINING_COSTS, training_cost_tables(report)),
        Section("checkpoints", "Checkpoints", "", [_checkpoints(report)]),
    ]
    filled = (_with_contents(part, report) for part in parts)
    return [part for part in filled if part.tables or part.pictures]


_GAPS = (
    "What an arm scores more than the float run it came from, and the share of the loss of PTQ that QAT wins "
    "back: 100 % is float, 0 % is PTQ."
)
_CHECKS = "What `--fail_if` says that no score may be."
_BEV = (
    "The sample with the most annotated objects; forward is up. Detections are shown from the score on at "
    "which float's F1 is largest for their class. A ring marks an object that only float, or only this arm, "
    "finds."
)
_RANGE = "A bin averages the classes whose class range reaches it."
_CONFIDENCE = (
    "The expected calibration error is the mean distance of score and precision over ten bins of score, "
    "weighted by their detections; 0 is perfect. Precision per bin shows where it comes from."
)
_LOST = (
    "An object is found where a detection matches it within 2 m with at least the score at which float's F1 "
    "is largest for its class. Lost: found by float alone. Won: found by the arm alone. Shares are of the "
    "objects that float finds. `lost_objects.csv` lists every one."
)


def _with_contents(part: Section, report: Document) -> Section:
    """Without empty tables, with its pictures."""
    pictures = [(p["file"], p["caption"]) for p in report["pictures"] if p["section"] == part.name]
    tables = [table for table in part.tables if table.rows and len(table.header) > 1]
    return Section(part.name, part.title, part.text, tables, part.notes, pictures, part.is_headline)


def _of_unknown_postprocessing(report: Document) -> list[str]:
    return [run["title"] for run in report["runs"] if run["postprocessing_sha256"] == UNKNOWN]


def _postprocessing_notes(report: Document) -> list[str]:
    return [
        f"{title}: its post-processing is unknown, and may be part of what tells it from the others."
        for title in _of_unknown_postprocessing(report)
    ]


def scores_table(report: Document) -> Table:
    """MAP, NDS and the five errors of each run, from its "title", "metrics" and "confidence"."""
    errors = [f"m{error}" for error in TP_ERRORS]
    metrics = [name for name in HEADLINE if report["runs"][0]["metrics"][name] is not None]
    has_trained = any(run.get("trained") for run in report["runs"])
    rows = [
        [
            run["title"],
            *(_with_interval(run["metrics"][name], run["confidence"][name]) for name in metrics),
            *([_trained(run)] if has_trained else []),
            *(number(run["metrics"][error]) for error in errors),
        ]
        for run in report["runs"]
    ]
    trained = ["mAP of trained classes"] if has_trained else []
    return Table("Scores", ["arm", *metrics, *trained, *errors], rows)


def _about_scores(report: Document) -> list[str]:
    """What of the scores is not as nuScenes has it."""
    of_runs = [(run["title"], run["dataset"]) for run in report["runs"]]
    skipped = report["dataset"].get("skipped_scenes", [])
    return [
        *([NO_NDS] if report["runs"][0]["metrics"]["NDS"] is None else []),
        *([f"{len(skipped)} scenes were skipped, for files of theirs are missing."] if skipped else []),
        *(
            f"{title}: trained on {said['trained_on']}; scores on what it was trained on are too good."
            for title, said in of_runs
            if "trained_on" in said
        ),
        *(
            f"{title}: {n} sweeps were left out."
            for title, said in of_runs
            if (n := said.get("num_bad_sweeps"))
        ),
        *_postprocessing_notes(report),
    ]


def _trained(run: Document) -> str:
    """MAP over the classes that a network was made for: all, unless `metrics.json` says otherwise."""
    if not run.get("trained"):
        return _with_interval(run["metrics"]["mAP"], run["confidence"]["mAP"])
    scored = _with_interval(run["trained"]["mAP"], run["trained"]["confidence"])
    return f"{scored} ({len(run['trained']['classes'])} of {len(run['per_class'])})"


def _gaps(report: Document) -> Table:
    metrics = list(report["runs"][0]["gap_to_float"])
    rows = [
        [
            run["title"],
            *(_with_interval(gap["value"], gap["interval"], "+.4f") for gap in run["gap_to_float"].values()),
            *(number(share["value"], ".0%") for share in run["ptq_loss_won_back"].values()),
        ]
        for run in report["runs"]
    ]
    gaps = [f"{metric} gap to float" for metric in metrics]
    won_back = [f"PTQ loss in {metric} won back" for metric in metrics]
    return Table("Against float", ["arm", *gaps, *won_back], rows)


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
        [name, *(number(run["per_class"][name]["AP"]["mean"]) for run in report["runs"])]
        for name in report["runs"][0]["per_class"]
    ]
    thresholds = ", ".join(f"{threshold:g}" for threshold in THRESHOLDS_M)
    return Table(f"AP per class, mean over {thresholds} m", ["class", *_titles(report)], rows)


def _errors_per_class(report: Document) -> list[Table]:
    return [
        Table(
            f"{error} per class",
            ["class", *_titles(report)],
            [
                [name, *(number(run["per_class"][name][error]) for run in report["runs"])]
                for name in report["runs"][0]["per_class"]
            ],
        )
        for error in TP_ERRORS
    ]


def _per_range(report: Document) -> Table:
    rows = [
        [run["title"], *(number(run["per_range"][name]["mAP"]) for name in _bins(report))]
        for run in report["runs"]
    ]
    return Table("mAP per distance from the vehicle", ["arm", *(f"{name} m" for name in _bins(report))], rows)


def _errors_per_range(report: Document) -> list[Table]:
    known, bins = [run for run in report["runs"] if run["errors_per_range"]], _bins(report)
    return [
        Table(
            f"m{error} per distance from the vehicle",
            ["arm", *(f"{name} m" for name in bins)],
            [
                [
                    run["title"],
                    *(number(run["errors_per_range"][name][f"m{error}"]) for name in bins),
                ]
                for run in known
            ],
        )
        for error in TP_ERRORS
    ]


def _calibration(report: Document) -> Table:
    bins = [f"{number / NUM_BINS:g}-{(number + 1) / NUM_BINS:g}" for number in range(NUM_BINS)]
    rows = [
        [
            run["title"],
            number(run["reliability"]["expected_error"]),
            *(number(value, ".2f") for value in run["reliability"]["precision"]),
        ]
        for run in report["runs"]
        if run["reliability"]
    ]
    return Table("Expected calibration error, and precision per score", ["arm", "error", *bins], rows)


_GROUPS = {"all": "", "class": "class", "range_m": "distance (m)", "num_points": "points in the object"}


def _lost_objects(report: Document) -> list[Table]:
    return [_lost_table(report, group, name) for group, name in _GROUPS.items()]


def _lost_table(report: Document, group: str, name: str) -> Table:
    """A row for each member of the group, a column of lost and one of won objects for each run."""
    known = [(run["title"], run["lost_objects"][group]) for run in report["runs"] if run["lost_objects"]]
    members = list(known[0][1]) if known else []
    columns = [f"{title}: {change}" for title, _ in known for change in ("lost", "won")]
    rows = [
        [
            member,
            str(known[0][1][member]["objects"]),
            str(known[0][1][member]["found_by_float"]),
            *(_change(of_run, member, change) for _, of_run in known for change in ("lost", "won")),
        ]
        for member in members
    ]
    title = f"Objects lost and won by {name}" if name else "Objects lost and won"
    return Table(title, [name or "objects", "annotated", "float finds", *columns], rows)


def _change(of_run: Counts, member: str, change: str) -> str:
    cell = of_run[member]
    share = f" ({cell[change] / cell['found_by_float']:.0%})" if cell["found_by_float"] else ""
    return f"{cell[change]}{share}"


def _drifts(report: Document) -> list[Table]:
    header = ["quantizer", "amax / its start", "clipped share", "SQNR of weights (dB)"]
    return [
        Table(
            f"{run['title']}: the ranges that moved furthest, at their last reading",
            header,
            [
                [
                    code(name),
                    NONE if reading["drift"] is None else f"{2 ** reading['drift']:.3f}",
                    number(reading["clipped_share"], ".3%"),
                    number(reading["sqnr_db"], ".1f"),
                ]
                for name, reading in run["amax_drift"].items()
            ],
        )
        for run in report["runs"]
        if run["amax_drift"]
    ]


def _checkpoints(report: Document) -> Table:
    rows = [
        [run["title"], code(run["checkpoint"]["path"]), code(run["checkpoint"]["sha256"][:12])]
        for run in report["runs"]
    ]
    return Table("Checkpoints", ["arm", "file", "SHA-256"], rows)


def _bins(report: Document) -> list[str]:
    return list(report["runs"][0]["per_range"])


def _titles(report: Document) -> list[str]:
    return [run["title"] for run in report["runs"]]


def _with_interval(value: float | None, interval: Any, form: str = ".4f") -> str:
    if value is None or interval is None:
        return number(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
