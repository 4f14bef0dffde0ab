"""The pictures of a report: charts as SVG, samples from above as PNG, and what runs bring along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpq_train.common.file_names import file_name
from cpq_train.common.files import check_regular, write_whole
from cpq_train.evaluation.boxes import Bools
from cpq_train.evaluation.gaps import compared_metrics
from cpq_train.evaluation.lost_objects import UNMATCHED, Changes, operating_scores
from cpq_train.evaluation.metric import curves
from cpq_train.evaluation.protocol import RECALL_GRID, TP_THRESHOLD_INDEX
from cpq_train.evaluation.ranges import bin_names
from cpq_train.evaluation.reliability import reliability, scores_are_chances
from cpq_train.report import charts
from cpq_train.report.amax_history import (
    AMAX_DRIFT_FILE,
    AMAX_DRIFT_PICTURE,
    drift_map,
    most_moved,
    read_amax_history,
)
from cpq_train.report.bev import BEV_FILE, BevSample, read_bev_sample
from cpq_train.report.close_ups import CLOSE_UP_EXTENT_M, MAX_OBJECTS, CloseUp, draw_close_ups
from cpq_train.report.plots import BevPanel, draw_bev
from cpq_train.report.runs import Run, relative

FOLDER = "pictures"
MAX_QUANTIZERS, MAX_STEPS = 40, 48
"""Rows and columns of the heat map of ranges."""


class Figure(NamedTuple):
    """A picture of the report.

    Attributes:
        section: the section it belongs to.
        file: where it lies, relative to the report.
        caption: what it shows and how to read it.
    """

    section: str
    file: str
    caption: str


def draw_figures(runs: Sequence[Run], changed: Mapping[str, Changes], output: Path) -> list[dict[str, str]]:
    """Draw what the runs have the files for.

    Args:
        runs: the runs.
        changed: run name to what it finds and loses against float.
        output: folder of the report; pictures go into its folder `pictures`.

    Returns:
        `Figure`s as mappings.
    """
    (output / FOLDER).mkdir(exist_ok=True)
    figures = [_write(output, *chart) for chart in _charts(runs)]
    figures += [*_bev_figures(runs, changed, output), *_drift_figures(runs, output), *_brought(runs, output)]
    return [figure._asdict() for figure in figures]


def _picture(name: str, suffix: str = ".png") -> str:
    """Where a picture lies, relative to the report."""
    return f"{FOLDER}/{file_name(name, suffix)}"


def _write(output: Path, section: str, name: str, caption: str, svg: str) -> Figure:
    file = _picture(name, ".svg")
    write_whole(output / file, svg + "\n")
    return Figure(section, file, caption)


def _charts(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, str]]:
    """Section, file name, caption and SVG of the charts that need metrics and matches only."""
    yield "scores", "scores", "Scores with their 95 % intervals.", _score_chart(runs)
    task = runs[0].task
    per_class = {
        run.title: [run.metrics["per_class"][name]["AP"]["mean"] for name in task.names] for run in runs
    }
    yield "classes", "per_class", "AP per class.", charts.bars(task.names, per_class, "AP")
    if curves_of := [run for run in runs if run.matches is not None]:
        caption = (
            "Precision over recall of every class, matches within 2 m; a curve ends at its highest recall."
        )
        yield "classes", "precision_recall", caption, _precision_recall(curves_of)
    bins = bin_names(task)
    per_range = {run.title: [run.metrics["per_range"][name]["mAP"] for name in bins] for run in runs}
    names = [f"{name} m" for name in bins]
    yield "range", "per_range", "mAP per distance from the vehicle.", charts.bars(names, per_range, "mAP")
    if rated := [run for run in curves_of if scores_are_chances(run.matches)]:
        caption = (
            "Left: share of detections that match within 2 m, over their score. On the diagonal a score is "
            "the chance of a match; above it the network is too modest, below it too sure. "
            "Right: how many detections stand behind each point."
        )
        yield "confidence", "reliability", caption, _reliability_chart(rated)


def _score_chart(runs: Sequence[Run]) -> str:
    return charts.intervals(
        {
            metric: [
                charts.Estimate(run.title, run.score(metric), run.metrics["confidence"][metric])
                for run in runs
            ]
            for metric in compared_metrics(runs[0].task)
        }
    )


def _precision_recall(runs: Sequence[Run]) -> str:
    precision = {
        run.title: curves(run.matches).precision[:, TP_THRESHOLD_INDEX] for run in runs if run.matches
    }
    panels = {
        name: {title: _reached(of_run[label]) for title, of_run in precision.items()}
        for label, name in enumerate(runs[0].task.names)
    }
    return charts.curves(panels, "recall", "precision")


def _reached(precision_R: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[tuple[float, float]]:
    reached = precision_R > 0
    return list(zip(RECALL_GRID[reached].tolist(), precision_R[reached].tolist(), strict=True))


def _reliability_chart(runs: Sequence[Run]) -> str:
    """Precision over score, and beside it how many detections stand behind each point."""
    found = {run.title: reliability(run.matches) for run in runs if run.matches}
    panels: dict[str, dict[str, charts.Points]] = {"precision": {}, "share of the detections": {}}
    for title, r in found.items():
        some = r.count > 0
        for panel, height in zip(
            panels.values(), (r.precision, r.count / max(r.count.sum(), 1)), strict=True
        ):
            panel[title] = list(zip(r.confidence[some].tolist(), height[some].tolist(), strict=True))
    return charts.curves(panels, "mean score", "share", columns=3, diagonal=True)


def _bev_figures(runs: Sequence[Run], changed: Mapping[str, Changes], output: Path) -> Iterator[Figure]:
    """A picture for every sample that runs kept, with the runs that kept it side by side."""
    samples = {
        run.name: read_bev_sample(path, run.task) for run in runs if lexists(path := run.folder / BEV_FILE)
    }
    panels = {
        run.name: _bev_panel(run, runs, samples[run.name], changed.get(run.name))
        for run in runs
        if run.name in samples
    }
    titles = {run.name: f"{run.title}: {_summary(panels[run.name])}" for run in runs if run.name in panels}
    for token in sorted({sample.token for sample in samples.values()}):
        shown = [name for name in panels if samples[name].token == token]
        file = _picture(f"bev_{token}")
        draw_bev(output / file, {titles[name]: panels[name] for name in shown}, runs[0].task)
        yield Figure("bev", file, f"Sample {token} from above, each arm in a panel.")
    for run in runs:
        baseline, _ = relative(run, runs, "float")
        if run.name in changed and baseline is not None and baseline.name in panels and run.name in panels:
            yield from _close_ups(baseline, run, panels, changed[run.name], output)


def _close_ups(
    baseline: Run, run: Run, panels: Mapping[str, BevPanel], changed: Changes, output: Path
) -> Iterator[Figure]:
    """The objects of the sample that float is surest of, among those that a run loses."""
    above, below = panels[baseline.name], panels[run.name]
    if below.lost is None or not below.lost.any() or above.sample.token != below.sample.token:
        return
    row_of = {token: row for row, token in enumerate(changed.tokens.tolist())}
    lost = [(row_of[below.sample.gt_tokens[row]], row) for row in np.flatnonzero(below.lost).tolist()]
    lost.sort(key=lambda pair: -changed.float_score[pair[0]])
    close_ups = [CloseUp(row, _object_title(changed, of, run.arm)) for of, row in lost[:MAX_OBJECTS]]
    file = _picture(f"{run.file_name}_lost")
    draw_close_ups(output / file, close_ups, (baseline.title, above), (run.title, below))
    caption = (
        f"Objects of this sample that {run.title} loses, those that {baseline.title} is surest of: above as "
        f"{baseline.title} sees them, below as {run.title} does. {2 * CLOSE_UP_EXTENT_M:g} m wide."
    )
    yield Figure("bev", file, caption)


def _object_title(changed: Changes, row: int, arm: str) -> str:
    name = changed.task.names[changed.labels[row]].replace("_", " ")
    of_both = (changed.float_score[row], changed.score[row])
    scores = ["none" if score == UNMATCHED else f"{score:.2f}" for score in of_both]
    where = f"{changed.range_m[row]:.0f} m, {changed.num_points[row]} points"
    return f"{name}, {where}\nscore: float {scores[0]}, {arm} {scores[1]}"


def _bev_panel(run: Run, runs: Sequence[Run], sample: BevSample, changed: Changes | None) -> BevPanel:
    baseline, _ = relative(run, runs, "float")
    if baseline is None or baseline.matches is None:
        return BevPanel(sample)
    needed = operating_scores(baseline.matches)
    if changed is None or not len(sample.gt_tokens):
        return BevPanel(sample, needed)
    found = (np.isin(sample.gt_tokens, changed.tokens[rows]) for rows in (changed.is_lost, changed.is_won))
    return BevPanel(sample, needed, *found)


def _summary(panel: BevPanel) -> str:
    shown = f"{int(panel.is_shown.sum())} detections"
    if panel.lost is None or panel.won is None:
        return f"{shown}, {len(panel.sample.gt_boxes)} objects"
    return f"{shown}, {_count(panel.lost)} lost, {_count(panel.won)} won"


def _count(rows: Bools) -> int:
    return int(np.count_nonzero(rows))


def _drift_figures(runs: Sequence[Run], output: Path) -> Iterator[Figure]:
    for run in runs:
        if not lexists(run.folder / AMAX_DRIFT_FILE):
            continue
        history = read_amax_history(run.folder / AMAX_DRIFT_FILE)
        shown = drift_map(history, most_moved(history, MAX_QUANTIZERS), MAX_STEPS)
        if shown is None:
            continue
        steps = list(map(str, shown.steps))
        svg = charts.heat_map(shown.names, steps, shown.drifts, shown.limit, "log2(amax / its start)")
        caption = (
            f"{run.title}: how ranges moved from where calibration left them; 1 is twice as wide, -1 half. "
            f"The {len(shown.names)} of {len(history)} quantizers that moved furthest."
        )
        yield _write(output, "quantizers", f"{run.file_name}_amax_drift", caption, svg)


def _brought(runs: Sequence[Run], output: Path) -> Iterator[Figure]:
    """Copies of the pictures that lie in run directories, such as that of a sensitivity analysis."""
    for run in runs:
        for picture in sorted(set(run.folder.glob("*.png")) - {run.folder / AMAX_DRIFT_PICTURE}):
            check_regular(picture, "picture")
            file = _picture(f"{run.file_name}_{picture.stem}")
            write_whole(output / file, picture.read_bytes())
            yield Figure("quantizers", file, f"{run.title}: {picture.stem.replace('_', ' ')}.")
