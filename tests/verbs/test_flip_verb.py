"""`validate --model.test_time_flip true`: other detections, and no comparison with runs without it."""

import json
from pathlib import Path

import pytest
from tiny_model import BASE, tiny_options

from cpq_train.verbs.cli import main


def test_flipped_runs_are_not_compared_with_others(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = arms["float"] / "checkpoints/last.ckpt"
    options = [*tiny_options(simulated_root, tmp_path / "flipped"), "--model.weights", str(weights)]
    main(["validate", "-c", BASE, *options, "--model.test_time_flip", "true"])
    flipped, plain = (
        json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "flipped", arms["float"])
    )
    assert flipped["checkpoint"]["sha256"] == plain["checkpoint"]["sha256"]
    assert flipped["config"]["test_time_flip"] is True
    assert flipped["postprocessing_sha256"] != plain["postprocessing_sha256"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["compare", str(arms["ptq"]), str(tmp_path / "flipped"), "--output", str(tmp_path / "report")])
    assert exit_.value.code == 2
    assert "postprocessing_sha256 is" in capsys.readouterr().err
