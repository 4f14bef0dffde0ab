"""The submission file of the nuScenes detection task, `results_nusc.json`: writing, reading and checking it.

Format: https://github.com/nutonomy/nuscenes-devkit/blob/master/python-sdk/nuscenes/eval/detection/README.md
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError, shown
from cpq_train.common.files import replacing
from cpq_train.evaluation.boxes import Boxes, Floats, Ints, Predictions, Strings
from cpq_train.evaluation.protocol import MAX_BOXES_PER_SAMPLE

LIDAR_ONLY = {
    "use_camera": False,
    "use_lidar": True,
    "use_radar": False,
    "use_map": False,
    "use_external": False,
}
"""The sensors a submission says it uses."""

_NUMBERS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}

_DEFAULTS = {"detection_score": -1.0, "num_pts": -1.0}
"""What nuscenes-devkit takes for keys that a box does not have; it passes over any others."""

_LARGEST = sys.float_info.max

Record = dict[str, Any]


def write_submission(
    path: Path, predictions: Predictions, sample_tokens: Strings, meta: Mapping[str, Any] = LIDAR_ONLY
) -> None:
    """Write a submission that names every sample, those without detections too.

    Samples and their detections keep their order, so nuscenes-devkit breaks ties between equal scores as
    `evaluate` does where detections are sorted by sample. The file appears only when it is whole.

    Args:
        path: the file to write.
        predictions: detections whose `sample` is a row of `sample_tokens`.
        sample_tokens: (S,) tokens of all samples of the split.
        meta: what the file says of itself.

    Raises:
        UserError: The official server would refuse these detections (`check_predictions`).
    """
    check_predictions(predictions, sample_tokens)
    order = np.argsort(predictions.boxes.sample, kind="stable")
    ordered = predictions[order]
    ends = np.searchsorted(ordered.boxes.sample, np.arange(len(sample_tokens)), side="right")
    with replacing(path) as partial, partial.open("w") as file:
        file.write(f'{{"meta": {json.dumps(dict(meta))}, "results": {{')
        start = 0
        for sample, (token, end) in enumerate(zip(sample_tokens.tolist(), ends.tolist(), strict=True)):
            records = _records(ordered[np.arange(start, end)], token)
            file.write(f"{', ' if sample else ''}{json.dumps(token)}: {json.dumps(records)}")
            start = end
        file.write("}}")


def _records(predictions: Predictions, token: str) -> list[Record]:
    boxes, task = predictions.boxes, predictions.task
    columns = (boxes.translation, boxes.size, boxes.rotation, boxes.velocity, predictions.score, boxes.label)
    return [
        {
            "sample_token": token,
            "translation": translation,
            "size": size,
            "rotation": rotation,
            "velocity": velocity,
            "detection_name": task.names[label],
            "detection_score": score,
            "attribute_name": "" if attribute < 0 else task.attributes[attribute],
        }
        for translation, size, rotation, velocity, score, label, attribute in zip(
            *(column.tolist() for column in (*columns, boxes.attribute)), strict=True
        )
    ]


def check_predictions(predictions: Predictions, sample_tokens: Strings) -> None:
    """Check that the official server would take these detections.

    Raises:
        UserError: A sample with more than 500 boxes, a number that is not finite, a size that is not above 0,
            or a class id that does not exist.
    """
    boxes = predictions.boxes
    _check_counts(boxes, sample_tokens)
    _check_numbers(predictions, sample_tokens)
    positive = (boxes.size > 0).all(axis=1)
    _check_column("size", "numbers above 0", boxes.size, positive, boxes.sample, sample_tokens)
    last = len(predictions.task.names) - 1
    known = (boxes.label >= 0) & (boxes.label <= last)
    _check_column("class id", f"0 to {last}", boxes.label, known, boxes.sample, sample_tokens)


def _check_counts(boxes: Boxes, sample_tokens: Strings) -> None:
    counts = np.bincount(boxes.sample, minlength=len(sample_tokens))
    if len(boxes) and counts.max() > MAX_BOXES_PER_SAMPLE:
        token = sample_tokens[counts.argmax()]
        raise UserError(
            f"sample {token}: {counts.max()} detections; at most {MAX_BOXES_PER_SAMPLE} are accepted"
        )


def _check_numbers(
    predictions: Predictions, sample_tokens: Strings, may_be_unknown: Collection[str] = ()
) -> None:
    """See that all numbers are finite, those that may be unknown apart, which may be NaN."""
    boxes = predictions.boxes
    columns = {name: getattr(boxes, name) for name in _NUMBERS} | {
        "detection_score": predictions.score[:, None]
    }
    for name, column in columns.items():
        good, accepted = np.isfinite(column), "finite numbers"
        if name in may_be_unknown:
            good, accepted = good | np.isnan(column), "finite numbers, or NaN"
        _check_column(name, accepted, column, good.all(axis=1), boxes.sample, sample_tokens)


def _check_column(
    name: str,
    accepted: str,
    column: Floats | Ints,
    good: np.ndarray[Any, np.dtype[np.bool_]],
    sample: Ints,
    tokens: Strings,
) -> None:
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        value = np.array2string(column[row], separator=", ")
        raise UserError(
            f"sample {tokens[sample[row]]}: {name} of a detection is {value}; accepted: {accepted}"
        )


def check_sample_tokens(found: Iterable[str], expected: Strings) -> None:
    """Check that results cover the samples of a split, each one and no other.

    Raises:
        UserError: Samples are missing or unknown.
    """
    have, want = set(found), set(expected.tolist())
    for kind, tokens in (("missing", want - have), ("not of this split", have - want)):
        if tokens:
            raise UserError(
                f"results for {len(have)} samples: {len(tokens)} {kind}, such as {sorted(tokens)[0]}; "
                f"accepted: exactly the {len(want)} samples of the split"
            )


def read_submission(path: Path, sample_tokens: Strings, task: DetectionTask = NUSCENES) -> Predictions:
    """Read and check a submission of any detector; rows are in the file's order.

    What nuscenes-devkit's `load_prediction` takes is taken as it takes it: velocities may be NaN, scores are
    any numbers (-1 where a box has none), boxes of `num_pts` 0 do not count, keys that it does not know are
    passed over. Refused beyond it: infinite numbers, texts for numbers, and boxes of another sample.

    Args:
        path: the submission.
        sample_tokens: (S,) tokens of all samples of the split.
        task: the classes and attributes that it may name.

    Raises:
        UserError: The file is no submission for exactly these samples; the message names what is wrong.
    """
    results = _load(path)
    try:
        check_sample_tokens(results, sample_tokens)
        predictions, num_points = _predictions(results, sample_tokens, task)
        _check_counts(predictions.boxes, sample_tokens)
        _check_numbers(predictions, sample_tokens, may_be_unknown=("velocity",))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return predictions[np.trunc(num_points) != 0]


def _load(path: Path) -> dict[str, list[Record]]:
    with _paused_garbage_collection():
        document = read_json(path, "submission")
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict) or "meta" not in document:
        raise UserError(
            f'{path}: no submission; accepted: {{"meta": {{…}}, "results": {{sample token: [box, …]}}}}'
        )
    return results


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """A split is millions of small objects; searching them for cycles takes longer than reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _predictions(
    results: dict[str, list[Record]], sample_tokens: Strings, task: DetectionTask
) -> tuple[Predictions, Floats]:
    """Detections, and (N,) the points that each says it holds."""
    row_of = {token: row for row, token in enumerate(sample_tokens.tolist())}
    for token, found in results.items():
        if not isinstance(found, list):
            raise UserError(f"sample {token}: detections are {shown(found)}; accepted: a list of boxes")
    records = [record for found in results.values() for record in found]
    sample = np.repeat([row_of[token] for token in results], [len(boxes) for boxes in results.values()])
    _check_records(records, results)
    boxes = Boxes(
        sample=sample.astype(np.int64),
        label=_ids(records, "detection_name", task.names),
        attribute=_ids(records, "attribute_name", task.attributes, none=""),
        **{name: _numbers(records, name, width) for name, width in _NUMBERS.items()},
    )
    score, num_points = (_numbers(records, name, 0)[:, 0] for name in _DEFAULTS)
    return Predictions(boxes, score, task), num_points


def _check_records(records: list[Record], results: dict[str, list[Record]]) -> None:
    wanted = {"sample_token", "detection_name", "attribute_name", *_NUMBERS}
    for token, record in zip(_token_of_each(results), records, strict=True):
        if not isinstance(record, dict) or not wanted <= record.keys():
            raise UserError(
                f"sample {token}: detection {shown(record)} lacks a key; accepted: {sorted(wanted)}"
            )
        if record["sample_token"] != token:
            raise UserError(f"sample {token}: a detection says sample_token {shown(record['sample_token'])}")


def _token_of_each(results: dict[str, list[Record]]) -> Iterator[str]:
    return (token for token, boxes in results.items() for _ in boxes)


def _ids(records: list[Record], key: str, names: tuple[str, ...], none: str | None = None) -> Ints:
    ids = {name: row for row, name in enumerate(names)} | ({} if none is None else {none: -1})
    try:
        return np.array([ids[record[key]] for record in records], np.int64)
    except (KeyError, TypeError) as error:
        raise UserError(f"{key} {error} is unknown; accepted: {', '.join(names)}") from error


def _numbers(records: list[Record], key: str, width: int) -> Floats:
    """(N, width) numbers of detections; NumPy would take texts, flags and nested lists for some.

    Args:
        records: The detections.
        key: What the numbers are.
        width: How many of them are in a list; 0 for a number that stands alone.
    """
    if width:
        lists = [record[key] for record in records]
    else:
        lists = [[record.get(key, _DEFAULTS[key])] for record in records]
    lengths, kinds = {width or 1}, {int, float}
    if not (set(map(type, lists)) <= {list} and set(map(len, lists)) <= lengths):
        bad = next(i for i, one in enumerate(lists) if type(one) is not list or {len(one)} != lengths)
    elif not set(map(type, chain.from_iterable(lists))) <= kinds:
        bad = next(i for i, one in enumerate(lists) if not set(map(type, one)) <= kinds)
    else:
        try:
            return np.array(lists, np.float64).reshape(len(lists), width or 1)
        except OverflowError:  # an integer beyond all floats
            bad = next(i for i, one in enumerate(lists) if any(abs(number) > _LARGEST for number in one))
    sample, value = records[bad]["sample_token"], shown(records[bad][key])
    accepted = f"list of {width} numbers" if width else "number"
    raise UserError(f"sample {sample}: {key} of a detection is no {accepted}: {value}")
