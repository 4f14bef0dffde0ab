"""The devkit engine on written submissions, whole splits and part of one."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import GroundTruth
from cpq_train.evaluation.devkit import evaluate_with_devkit
from cpq_train.evaluation.ground_truth import ground_truth
from cpq_train.evaluation.metric import Scores, evaluate
from cpq_train.evaluation.submission import read_submission, write_submission


def assert_equal(ours: Scores, devkit: Scores) -> None:
    np.testing.assert_allclose(ours.ap, devkit.ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.errors, devkit.errors, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.nds, devkit.nds, rtol=0, atol=1e-12)


def test_equals_the_devkit_on_a_written_submission(
    realdata_dir: Path, mini_index: NuScenesIndex, mini_gt: GroundTruth, tmp_path: Path
) -> None:
    predictions = read_submission(realdata_dir / "eval/results_nusc.json", mini_gt.samples.tokens)
    write_submission(tmp_path / "results.json", predictions, mini_gt.samples.tokens)
    devkit = evaluate_with_devkit(
        mini_index.root, "v1.0-mini", tmp_path / "results.json", mini_gt.samples.tokens
    )
    assert_equal(evaluate(mini_gt, predictions).scores, devkit)
    assert abs(devkit.nds - 0.10336284386435349) < 1e-12


def test_part_of_a_split(
    realdata_dir: Path,
    mini_index: NuScenesIndex,
    mini_rows: NDArray[np.int64],
    mini_gt: GroundTruth,
    tmp_path: Path,
) -> None:
    whole = read_submission(realdata_dir / "eval/results_nusc.json", mini_gt.samples.tokens)
    chosen = np.arange(3, 23)
    part = whole[np.isin(whole.boxes.sample, chosen)]
    part.boxes.sample[:] -= 3
    annotations = ground_truth(mini_index, mini_rows[chosen])
    write_submission(tmp_path / "results.json", part, annotations.samples.tokens)
    devkit = evaluate_with_devkit(
        mini_index.root, "v1.0-mini", tmp_path / "results.json", annotations.samples.tokens
    )
    ours = evaluate(annotations, part).scores
    assert ours.mean_ap > 0.02
    assert_equal(ours, devkit)


def test_no_detection_at_all(mini_index: NuScenesIndex, mini_gt: GroundTruth, tmp_path: Path) -> None:
    tokens = mini_gt.samples.tokens
    (tmp_path / "empty.json").write_text(json.dumps({"meta": {}, "results": {token: [] for token in tokens}}))
    predictions = read_submission(tmp_path / "empty.json", tokens)
    ours = evaluate(mini_gt, predictions).scores
    assert ours.mean_ap == 0
    assert ours.nds == 0
    assert_equal(ours, evaluate_with_devkit(mini_index.root, "v1.0-mini", tmp_path / "empty.json", tokens))
