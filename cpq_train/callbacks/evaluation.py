"""Scores every validation with the nuScenes metric and writes the files of a run directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.common.progress import say
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import points_of
from cpq_train.evaluation.devkit import check_devkit
from cpq_train.evaluation.gaps import NO_NDS
from cpq_train.evaluation.lightning_metric import NuScenesDetectionMetric
from cpq_train.evaluation.metric import Scores
from cpq_train.evaluation.metrics_file import RunInfo
from cpq_train.evaluation.run_files import METRICS_FILE, MetricEngine, ScoredSplit, write_run
from cpq_train.export.engine import Engine
from cpq_train.models.decode import PostProcessing
from cpq_train.profiling.report import size_summary
from cpq_train.profiling.storage import storage_rows
from cpq_train.quantization.coverage import coverage_of
from cpq_train.report.bev import BEV_FILE, BevSample, bev_sample, busiest_sample, write_bev_sample
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.scoring import check_unseen

TRAINED_MAP = "val/mAP_trained"
"""Logged name of the mAP over the classes that the network was made for, where these are not all."""


class Evaluation(Callback):
    """nuScenes mAP, NDS and true-positive errors of every validation.

    Logs `val/mAP` and `val/NDS`, of a network for some of the classes also `val/mAP_trained`, over these; of
    other classes than nuScenes' ten there is no NDS. `validate`, and `fit` at its end, write
    `metrics.json`, `results_nusc.json` (the submission), `matches.npz` and `bev_sample.npz` into
    `trainer.default_root_dir`. Where the trainer leaves samples out, those that it takes are scored, and
    no file is written: the score is not that of the split.

    Args:
        engine: Who computes the numbers of `metrics.json`: vectorised (this project) or devkit
            (nuscenes-devkit).
    """

    def __init__(self, engine: MetricEngine = "vectorised") -> None:
        self.engine: MetricEngine = engine
        self.scored: ScoredSplit | None = None
        self._metric: NuScenesDetectionMetric | None = None
        self._is_whole, self._num_bad_sweeps = False, 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a fit that validates, see that there is something to score, and that it may be."""
        if trainer.enable_validation:
            data = datamodule_of(trainer)
            self._say_uncounted(trainer, self._new_metric(trainer))
            data.selection.check_unseen(data.selection.trained_and_scored, "data.train_split")
            check_unseen(pl_module, data)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            checkpoint_of(trainer, pl_module)
        check_unseen(pl_module, datamodule_of(trainer))
        self._metric = self._new_metric(trainer).to(pl_module.device)
        if trainer.state.fn == "validate":
            self._say_uncounted(trainer, self._metric)

    def _new_metric(self, trainer: Trainer) -> NuScenesDetectionMetric:
        """What scores the validation samples.

        Raises:
            UserError: There is nothing to score, or not for the engine.
        """
        data = datamodule_of(trainer)
        if self.engine == "devkit":
            check_devkit(data.index)
        is_partial = bool(left_out_by(trainer))
        return NuScenesDetectionMetric(
            data.index, data.eval_rows, data.class_names, is_partial, data.splits.val
        )

    def _say_uncounted(self, trainer: Trainer, metric: NuScenesDetectionMetric) -> None:
        if metric.uncounted_classes and trainer.is_global_zero:
            split, names = datamodule_of(trainer).splits.val, ", ".join(metric.uncounted_classes)
            say(f"split {split}: no annotation counts of {names}; AP 0, and part of the mAP")

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._metric is not None
        self._metric.update(batch["sample_rows"], outputs["detections"])

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._metric is not None
        if trainer.sanity_checking:
            return
        self.scored = self._metric.compute()
        self._num_bad_sweeps = _over_ranks(trainer, datamodule_of(trainer).num_bad_sweeps)
        num_scored, num_all = len(self.scored.sample_tokens), len(datamodule_of(trainer).eval_rows)
        self._is_whole = num_scored == num_all
        if not self._is_whole and trainer.is_global_zero:
            why = left_out_by(trainer)
            print_plain(
                f"partial score: {num_scored} of {num_all} samples ({why}); {METRICS_FILE} is not written"
            )
        log_equal(pl_module, _logged(self.scored.scores, datamodule_of(trainer)), prog_bar=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and trainer.is_global_zero and self._is_whole:
            self._write(trainer, pl_module, checkpoint_of(trainer, pl_module))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        if self.scored is not None and last and trainer.is_global_zero and self._is_whole:
            self._write(trainer, pl_module, Path(last))

    def _write(self, trainer: Trainer, module: LightningModule, checkpoint: Path) -> None:
        assert isinstance(module, CenterPointDetector)
        assert self.scored is not None
        data = datamodule_of(trainer)
        run = run_info(module, data, checkpoint, self._num_bad_sweeps)
        run_dir = Path(trainer.default_root_dir)
        write_run(run_dir, self.scored, run, data.index, self.engine)
        write_bev_sample(run_dir / BEV_FILE, self._busiest_sample(data))
        if not data.task.is_nuscenes:
            print_plain(NO_NDS)

    def _busiest_sample(self, data: NuScenesDataModule) -> BevSample:
        """What a picture of the arms shows: the sample with the most annotations, the same for every arm."""
        assert self.scored is not None
        assert self._metric is not None
        (row,) = data.index.sample_rows(tokens=[busiest_sample(self.scored.evaluation.matches)]).tolist()
        points = points_of(data.index, row, data.evaluation_config)
        return bev_sample(data.index, row, points, self._metric.detections_of(row))


def _over_ranks(trainer: Trainer, number: int) -> int:
    """A count of all ranks; floats hold those of sweeps exactly."""
    total = trainer.strategy.reduce(
        torch.tensor(float(number), device=trainer.strategy.root_device), reduce_op="sum"
    )
    return int(total)


def _logged(scores: Scores, data: NuScenesDataModule) -> dict[str, float]:
    logged = {f"val/{name}": score for name, score in scores.headline.items()}
    if set(data.class_names) != set(scores.task.names):
        logged[TRAINED_MAP] = scores.mean_ap_of(data.class_names)
    return logged


def checkpoint_of(trainer: Trainer, module: LightningModule) -> Path:
    """The checkpoint that a verb runs, or that the deployment file it runs was made of.

    Raises:
        UserError: None was given.
    """
    assert isinstance(module, CenterPointDetector)
    if module.engine is not None:
        return Path(module.engine.sidecar.checkpoint["path"])
    path = trainer.ckpt_path or module.weights
    if path is None:
        assert trainer.state.fn is not None
        raise UserError(f"{trainer.state.fn.value} needs model.weights, --ckpt_path or model.engine_file")
    return Path(path)


def run_info(
    module: CenterPointDetector, data: NuScenesDataModule, checkpoint: Path, num_bad_sweeps: int = 0
) -> RunInfo:
    """What `metrics.json` says of a run beside its scores; sweeps that all ranks left out among it."""
    trained_on = module.trained_on.get(data.index.fingerprint)
    return RunInfo(
        arm=module.row,
        dataset={**data.scored_info(num_bad_sweeps), **({"trained_on": trained_on} if trained_on else {})},
        split=data.splits.val,
        trained_classes=data.class_names,
        postprocessing_sha256=postprocessing_sha256(module.post_processing, module.test_time_flip),
        config=dict(module.hparams),
        **(_of_network(module, checkpoint) if module.engine is None else _of_engine(module.engine)),
    )


def _of_network(module: CenterPointDetector, checkpoint: Path) -> dict[str, Any]:
    subject = module.subject
    return {
        "checkpoint_path": str(checkpoint),
        "checkpoint_sha256": sha256_of(checkpoint),
        "parents": subject.parents,
        "coverage": coverage_of(subject.prepared).counts,
        "profile": size_summary(storage_rows(module.network)),
    }


def _of_engine(engine: Engine) -> dict[str, Any]:
    said = engine.sidecar
    return {
        "checkpoint_path": said.checkpoint["path"],
        "checkpoint_sha256": said.checkpoint["sha256"],
        "parents": said.parents,
        "coverage": said.coverage,
        "profile": {"engine_file_bytes": said.file["num_bytes"]},
        "engine": engine.describe(),
    }


def postprocessing_sha256(config: PostProcessing, test_time_flip: bool = False) -> str:
    """Hash of the settings from heat maps to boxes: arms that differ in them are not compared."""
    settings = asdict(config) | ({"test_time_flip": True} if test_time_flip else {})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def log_equal(module: LightningModule, values: dict[str, float], prog_bar: bool = False) -> None:
    """Log numbers that every rank has alike; a checkpoint callback monitors them on every rank."""
    module.log_dict(values, prog_bar=prog_bar, sync_dist=module.trainer.world_size > 1)


def left_out_by(trainer: Trainer) -> str:
    """What lets the trainer leave samples out of an evaluation, for a sentence; empty where it takes all."""
    for name in ("fast_dev_run", "overfit_batches"):
        if value := getattr(trainer, name):
            return f"trainer.{name} {value}"
    split = {"test": "test", "predict": "predict"}.get(str(trainer.state.fn.value), "val")  # type: ignore[union-attr]
    limit = getattr(trainer, f"limit_{split}_batches")
    # 1 is one batch, and equal to 1.0, which is all.
    is_all = isinstance(limit, float) and limit == 1.0
    return "" if is_all else f"trainer.limit_{split}_batches {limit}"


def datamodule_of(trainer: Trainer) -> NuScenesDataModule:
    """The data module of a run."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, NuScenesDataModule)
    return data
