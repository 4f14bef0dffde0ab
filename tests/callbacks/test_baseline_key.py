"""Kept scores of baselines are found again by runs that share all that they depend on, and by no others."""

from dataclasses import replace
from pathlib import Path

from cpq_train.callbacks.baselines import baseline_key
from cpq_train.common.detection_task import NUSCENES
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.training.detector import CenterPointDetector

TEN = dict(zip(NUSCENES.names, NUSCENES.rules, strict=True))


def test_scores_by_other_rules_are_kept_apart(arms: dict[str, Path], simulated_root: Path) -> None:
    detector = CenterPointDetector.load_from_checkpoint(arms["ptq"] / "ptq.ckpt")
    near = {name: replace(rules, range_m=15.0) for name, rules in TEN.items()}
    usual, same, other = (
        baseline_key("float", detector, NuScenesDataModule(str(simulated_root), classes=classes))
        for classes in (None, TEN, near)
    )
    assert usual == same != other
