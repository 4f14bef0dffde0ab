"""The score of a checkpoint does not depend on whose kernels compute."""

from pathlib import Path

import pytest

from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.sparse import reference_kernels
from cpq_train.verbs.cli import main


@pytest.mark.parametrize("arm", ["float", "qat"])
def test_a_checkpoint_is_scored_alike(arm: str, arms: dict[str, Path], tmp_path: Path) -> None:
    run = arms[arm]
    with reference_kernels():
        main(
            [
                *("validate", "-c", str(run / "config.yaml")),
                *("--ckpt_path", str(run / "checkpoints/last.ckpt")),
                *("--trainer.default_root_dir", str(tmp_path)),
            ]
        )
    theirs, ours = (read_metrics(folder / "metrics.json")["metrics"] for folder in (tmp_path, run))
    assert theirs == ours
    assert (tmp_path / "results_nusc.json").read_bytes() == (run / "results_nusc.json").read_bytes()
