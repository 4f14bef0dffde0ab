"""What `test` and `predict` write: the submission of a split, or boxes and pictures of any clouds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.callbacks.evaluation import checkpoint_of, datamodule_of, left_out_by
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.file_names import file_name
from cpq_train.common.progress import track
from cpq_train.data.cloud_files import points_of_file
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import points_of
from cpq_train.evaluation.boxes import Ints, Predictions, Strings
from cpq_train.evaluation.lightning_metric import DetectionCollector
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.evaluation.predictions import (
    LidarDetections,
    predictions_from_detections,
    predictions_in_lidar_frame,
)
from cpq_train.evaluation.run_files import METRICS_FILE, SUBMISSION_FILE
from cpq_train.evaluation.submission import LIDAR_ONLY, write_submission
from cpq_train.report.bev import BevSample, bev_sample, bev_sample_of_cloud
from cpq_train.report.plots import BevPanel, draw_bev

PREDICTIONS_FILE = "predictions.json"
PICTURES = "bev"
MAX_PICTURES = 100
"""Of further samples only the boxes are written: a picture takes about a second."""


class WritePredictions(Callback):
    """Collects the detections of `test` and `predict` on all ranks and writes them on one.

    `test` writes `results_nusc.json` of `data.test_split`, complete and checked. `predict` writes
    `predictions.json` and a picture from above of each of the first samples into `bev/`.
    """

    def __init__(self) -> None:
        self._collector: DetectionCollector | None = None

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint_of(trainer, pl_module)
        data = datamodule_of(trainer)
        _check_no_scores_are_lost(Path(trainer.default_root_dir), data.splits.test)
        self._collector = DetectionCollector(data.test_rows, data.class_names, data.task).to(pl_module.device)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint_of(trainer, pl_module)
        data = datamodule_of(trainer)
        collector = DetectionCollector(data.predict_rows, data.class_names, data.task)
        self._collector = collector.to(pl_module.device)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._collector is not None
        self._collector.update(batch["sample_rows"], outputs["detections"])

    on_predict_batch_end = on_test_batch_end

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        detections = self._of_all_ranks()
        data, path = datamodule_of(trainer), Path(trainer.default_root_dir) / SUBMISSION_FILE
        if not trainer.is_global_zero:
            return
        if len(detections) < len(data.test_rows) and (why := left_out_by(trainer)):
            print_plain(
                f"{len(detections)} samples are detected in ({why}); {SUBMISSION_FILE} is not written"
            )
        else:
            _write(path, _in_global_frame(data, data.test_rows, detections), _tokens(data, data.test_rows))

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        detections = self._of_all_ranks()
        if trainer.is_global_zero:
            data, folder = datamodule_of(trainer), Path(trainer.default_root_dir)
            _write_predictions(folder / PREDICTIONS_FILE, data, detections)
            _draw(folder / PICTURES, data, detections)

    def _of_all_ranks(self) -> dict[int, LidarDetections]:
        assert self._collector is not None
        detections: dict[int, LidarDetections] = self._collector.compute()
        return detections


def _check_no_scores_are_lost(folder: Path, test_split: str) -> None:
    """A scored run keeps its submission: another split's would take its place.

    Raises:
        UserError: The folder holds the scores of another split.
    """
    if not (folder / METRICS_FILE).exists():
        return
    scored = read_metrics(folder / METRICS_FILE)["dataset"]["split"]
    if scored != test_split:
        raise UserError(
            f"{folder} holds the scores of split {scored!r}, whose {SUBMISSION_FILE} that of {test_split!r} "
            "would replace: give another --trainer.default_root_dir"
        )


def _tokens(data: NuScenesDataModule, rows: Ints) -> Strings:
    return np.array([data.index.sample_token(row) for row in rows.tolist()])


def _in_global_frame(
    data: NuScenesDataModule, rows: Ints, detections: dict[int, LidarDetections]
) -> Predictions:
    return predictions_from_detections(data.index, rows, detections)


def _write(path: Path, found: Predictions, names: Strings, **meta: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_submission(path, found, names, {**LIDAR_ONLY, **meta})
    print_plain(f"{path}: {len(found.score):,} boxes of {len(names):,} samples")


def _write_predictions(path: Path, data: NuScenesDataModule, detections: dict[int, LidarDetections]) -> None:
    rows = _detected(data, detections)
    if data.clouds is None:
        _write(path, _in_global_frame(data, rows, detections), _tokens(data, rows), frame="global")
        return
    found = predictions_in_lidar_frame([detections[row] for row in rows.tolist()], data.task)
    clouds = np.array([str(data.clouds[row]) for row in rows.tolist()])
    _write(path, found, clouds, frame=data.lidar_channel)


def _detected(data: NuScenesDataModule, detections: dict[int, LidarDetections]) -> Ints:
    """Rows of the samples that the trainer took: all, unless it was told to leave some out."""
    return np.array([row for row in data.predict_rows.tolist() if row in detections], dtype=np.int64)


def _draw(folder: Path, data: NuScenesDataModule, detections: dict[int, LidarDetections]) -> None:
    """A picture of each sample, named after its token, or after the place and name of its file."""
    rows = _detected(data, detections).tolist()
    for row in track(rows[:MAX_PICTURES], "Drawing"):
        sample = _sample(data, row, detections[row])
        name = sample.token if data.clouds is None else f"{row}_{_stem(data.clouds[row])}"
        panel = BevPanel(sample)
        title = f"{_stem(Path(sample.token))}\n{panel.is_shown.sum()} detections"
        draw_bev(folder / file_name(name, ".png"), {title: panel}, data.task)
    if len(rows) > MAX_PICTURES:
        print_plain(f"Pictures of the first {MAX_PICTURES} of {len(rows)} samples: {folder}")


def _sample(data: NuScenesDataModule, row: int, found: LidarDetections) -> BevSample:
    if data.clouds is not None:
        points = points_of_file(data.clouds[row], data.evaluation_config)
        return bev_sample_of_cloud(str(data.clouds[row]), points, found)
    points = points_of(data.index, row, data.evaluation_config)
    return bev_sample(data.index, row, points, found)


def _stem(path: Path) -> str:
    return path.stem.removesuffix(".pcd") if path.suffix in (".bin", ".npy", ".pcd") else path.name
