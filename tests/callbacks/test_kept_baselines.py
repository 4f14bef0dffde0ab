"""Scores of baselines that were kept: a damaged one is scored again, and said."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import files_of_at_most

from cpq_train.callbacks.baselines import _read, _write
from cpq_train.common.detection_task import NUSCENES

SCORE = {"mAP": 0.25, "NDS": 0.5}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _write(tmp_path / "kept/score.json", SCORE)
    return tmp_path / "kept/score.json"


def test_a_score_is_read_back(file: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert _read(file, NUSCENES) == SCORE
    assert not recwarn.list


def test_a_score_of_an_earlier_release(tmp_path: Path) -> None:
    (tmp_path / "score.json").write_text(json.dumps(SCORE))
    with pytest.warns(UserWarning, match="has no checksum: it is taken as it is"):
        assert _read(tmp_path / "score.json", NUSCENES) == SCORE


DAMAGE: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-5].encode(),
    "no UTF-8": lambda text: b"\xff" + text.encode(),
    "a list": lambda text: b"[]",
    "nested": lambda text: b"[" * 100_000,
    "another digit": lambda text: text.replace("0.25", "0.35").encode(),
    "NaN": lambda text: text.replace("0.25", "NaN").encode(),
    "too large": lambda text: json.dumps({**SCORE, "mAP": 1e308}).encode(),
    "text": lambda text: json.dumps({**SCORE, "mAP": "0.25"}).encode(),
    "missing": lambda text: json.dumps({"mAP": 0.25}).encode(),
    "another checksum": lambda text: json.dumps({**SCORE, "crc32": [1]}).encode(),
}


@pytest.mark.parametrize("way", DAMAGE)
def test_a_damaged_score_is_scored_again(file: Path, way: str) -> None:
    file.write_bytes(DAMAGE[way](file.read_text()))
    with pytest.warns(UserWarning, match="it is scored again"):
        assert _read(file, NUSCENES) is None


def test_a_full_disk_costs_no_more_than_the_score(tmp_path: Path) -> None:
    with files_of_at_most(10), pytest.warns(UserWarning, match="score is not kept .* bytes are free"):
        _write(tmp_path / "score.json", SCORE)
    assert os.listdir(tmp_path) == []
