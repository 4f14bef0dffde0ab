from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cpq_train.callbacks import predictions
from cpq_train.common.detection_task import NUSCENES
from cpq_train.report.bev import BevSample


@pytest.mark.parametrize("token", ["../../escaped", "/escaped", "..", "a" * 300])
def test_a_sample_token_names_no_other_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    none = np.zeros((0, 9))
    sample = BevSample(token, np.zeros((1, 3)), none, none[:, 0].astype(int), none, none[:, 0], none[:, 0])
    monkeypatch.setattr(predictions, "_sample", lambda *_: sample)
    data = SimpleNamespace(clouds=None, predict_rows=np.array([0]), task=NUSCENES)
    predictions._draw(tmp_path / "run/bev", data, {0: None})  # type: ignore[arg-type, dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["bev"]
    assert len(list((tmp_path / "run/bev").glob("*.png"))) == 1
