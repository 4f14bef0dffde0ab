"""The published recipe end to end: GT sampling and class balance in the data module and in a fit."""

import csv
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_model import BASE, tiny_options

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.class_balance import class_balanced_rows
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import Batch
from cpq_train.data.gt_sampling import GtSampling
from cpq_train.data.index import NuScenesIndex
from cpq_train.verbs.cli import main


def datamodule(root: Path, cache: Path, **arguments: Any) -> NuScenesDataModule:
    defaults: dict[str, Any] = {
        "version": "v1.0-trainval", "num_sweeps": 2, "voxel_size": (0.64, 0.64, 0.32), "batch_size": 2,
        "num_workers": 0, "gt_sampling": GtSampling(), "class_balanced": True, "cache_dir": str(cache),
    }  # fmt: skip
    return NuScenesDataModule(str(root), **(defaults | arguments))


def epoch(data: NuScenesDataModule, number: int = 0, limit: int | None = 4) -> list[Batch]:
    """The first batches of an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(itertools.islice(loader, limit))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    keys = ("voxel_features", "voxel_coords", "gt_boxes", "sample_rows")
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in keys)  # type: ignore[literal-required]


def test_batches_do_not_depend_on_workers(simulated_root: Path, simulated_cache: Path) -> None:
    alone = epoch(datamodule(simulated_root, simulated_cache), 3)
    shared = epoch(datamodule(simulated_root, simulated_cache, num_workers=2), 3)
    assert equal(alone, shared)
    assert not equal(alone, epoch(datamodule(simulated_root, simulated_cache), 4))


def test_the_order_of_class_names_changes_labels_alone(simulated_root: Path, simulated_cache: Path) -> None:
    usual = epoch(datamodule(simulated_root, simulated_cache))
    names = DETECTION_CLASSES[::-1]
    reversed_ = epoch(datamodule(simulated_root, simulated_cache, class_names=names))
    assert not equal(reversed_, usual)
    for batch in reversed_:
        labels = batch["gt_boxes"][..., 9]
        labels[labels > 0] = 11 - labels[labels > 0]
    assert equal(reversed_, usual)


def test_an_epoch_is_the_balanced_choice(
    simulated_root: Path, simulated_cache: Path, simulated_index: NuScenesIndex
) -> None:
    batches = epoch(datamodule(simulated_root, simulated_cache, gt_sampling=None), limit=None)
    chosen = class_balanced_rows(simulated_index, simulated_index.sample_rows("train"), 0)
    seen = [row for batch in batches for row in batch["sample_rows"].tolist()]
    assert sorted(seen) == sorted(chosen.tolist())
    other_seed = datamodule(simulated_root, simulated_cache, gt_sampling=None, seed=1).train_dataloader()
    assert sorted(other_seed.dataset.rows.tolist()) != sorted(seen)


def test_calibration_and_evaluation_see_real_scenes(simulated_root: Path, simulated_cache: Path) -> None:
    recipe = datamodule(simulated_root, simulated_cache, num_calibration_samples=2)
    plain = datamodule(
        simulated_root, simulated_cache, num_calibration_samples=2, gt_sampling=None, class_balanced=False
    )
    assert equal(list(recipe.calibration_dataloader()), list(plain.calibration_dataloader()))
    assert equal(list(recipe.val_dataloader()), list(plain.val_dataloader()))


def test_fading_out_counts_the_epochs_of_the_trainer(simulated_root: Path, simulated_cache: Path) -> None:
    fading = datamodule(simulated_root, simulated_cache, gt_sampling=GtSampling(fade_out_epochs=1))
    with pytest.raises(UserError, match=r"set trainer\.max_epochs"):
        fading.setup("fit")
    fading.trainer = Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    always = datamodule(simulated_root, simulated_cache)
    never = datamodule(simulated_root, simulated_cache, gt_sampling=None)
    for number, same_as in ((1, always), (2, never)):
        assert equal(epoch(fading, number), epoch(same_as, number))
    fading.trainer = Trainer(max_epochs=-1, max_steps=9, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"set trainer\.max_epochs"):
        fading.setup("fit")


def recipe_options(root: Path, run: Path, cache: Path) -> list[str]:
    return [
        *tiny_options(root, run),
        *("--data.cache_dir", str(cache), "--data.class_balanced", "true"),
        *("--data.gt_sampling.min_points", "4", "--trainer.limit_val_batches", "0"),
    ]


def test_fit(simulated_root: Path, simulated_cache: Path, tmp_path: Path) -> None:
    options = [*recipe_options(simulated_root, tmp_path, simulated_cache), "--data.num_workers", "1"]
    options += ["--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1"]
    main(["fit", "-c", BASE, *options])
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 3
    assert all(0 < loss < 1e4 for loss in losses)


def test_fit_without_a_database_names_the_command(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = recipe_options(simulated_root, tmp_path / "run", tmp_path / "cache")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "-c", BASE, *options])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    command = re.search(r"python -m cpq_train (build-gt-database .*)", error)
    assert command is not None
    main(command[1].split())
    assert "GT database:" in capsys.readouterr().out
    assert list((tmp_path / "cache").glob("*/v1.0-trainval/gt-*/points.npy"))
