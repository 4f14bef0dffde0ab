"""Scores the arms that a tuned network is measured against, once, and logs the gap at every validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from pydantic import Field, TypeAdapter
from typing_extensions import override

from cpq_train.callbacks.evaluation import (
    Evaluation,
    datamodule_of,
    left_out_by,
    log_equal,
    postprocessing_sha256,
)
from cpq_train.callbacks.validations import has_validation
from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.documents import SEAL, read_json, sealed, unsealed
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole
from cpq_train.common.schema import accepts, keys, validated
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.evaluation.gaps import compared_metrics, share_won_back
from cpq_train.quantization.switches import quantizers_off
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.scoring import score_detector

Score = dict[str, float]

_SHARE = Annotated[float, Field(strict=True, ge=0, le=1), accepts("a number from 0 to 1")]

BASELINES = {"qat": ("float", "ptq"), "float_tuned": ("float",)}
"""Arm -> what it is compared with while it trains."""


class Baselines(Callback):
    """Float and PTQ scores of the network that is being tuned, and how far it is from them.

    Before the first step of a `qat` fit the network *is* the PTQ one, and with its quantizers off the float
    one, so both are scored there; `float_tuned` has the float baseline alone. Scores are kept by source
    checkpoint, scheme, data and post-processing, and read back by every later run that shares them.

    Logs `val/<metric>_minus_float`, `val/<metric>_minus_ptq` and, where PTQ lost something,
    `val/<metric>_ptq_loss_won_back` for mAP and NDS.

    Args:
        cache_dir: Where scores are kept; null is `~/.cache/cpq_train/baselines`.
    """

    def __init__(self, cache_dir: str | None = None) -> None:
        self.cache_dir = Path(cache_dir) if cache_dir else Path.home() / ".cache" / "cpq_train" / "baselines"
        self.scores: dict[str, Score] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CenterPointDetector)
        if not has_validation(trainer):
            return  # nothing would be compared with them
        if why := left_out_by(trainer):
            rank_zero_info(f"{why}: scores may be partial, and are compared with no baseline")
            return
        for arm in BASELINES.get(pl_module.subject.arm, ()):
            score = self._score(arm, trainer, pl_module)
            if score is not None:
                self.scores[arm] = score

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scored = next(c.scored for c in trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]
        if self.scores and scored is not None and not trainer.sanity_checking:
            log_equal(pl_module, gaps(scored.scores.headline, self.scores))

    def _score(self, arm: str, trainer: Trainer, module: CenterPointDetector) -> Score | None:
        data = datamodule_of(trainer)
        file = self.cache_dir / f"{baseline_key(arm, module, data)}.json"
        # Rank 0 decides for all: other nodes may not see its cache, and scoring needs every rank.
        found = _read(file, data.task) if trainer.is_global_zero and file.is_file() else None
        cached: Score | None = trainer.strategy.broadcast(found)
        if cached is not None:
            return cached
        if module.subject.is_tuned or (arm == "float" and not module.subject.has_float_weights):
            rank_zero_warn(
                f"the {arm} baseline was never scored, and the weights are no longer its own "
                "(a float_tuned run scores the float one)"
            )
            return None
        score = _evaluate(arm, trainer, module, data)
        if trainer.is_global_zero:
            _write(file, score)
        return score


def gaps(now: Score, baselines: dict[str, Score]) -> Score:
    """Differences to the baselines, and the share of the PTQ loss won back (1 is float, 0 is PTQ)."""
    logs: Score = {}
    for metric in now:
        for arm, score in baselines.items():
            logs[f"val/{metric}_minus_{arm}"] = now[metric] - score[metric]
        if "ptq" in baselines:
            share = share_won_back(baselines["float"][metric], baselines["ptq"][metric], now[metric])
            if share is not None:
                logs[f"val/{metric}_ptq_loss_won_back"] = share
    return logs


def gap_names(arm: str, metrics: Sequence[str]) -> list[str]:
    """What `gaps` may log of these scores for an arm."""
    baselines = BASELINES.get(arm, ())
    names = [f"val/{metric}_minus_{baseline}" for metric in metrics for baseline in baselines]
    won_back = [f"val/{metric}_ptq_loss_won_back" for metric in metrics if "ptq" in baselines]
    return names + won_back


def baseline_key(arm: str, module: CenterPointDetector, data: NuScenesDataModule) -> str:
    """Hash of all that the score of a baseline depends on."""
    subject = module.subject
    parents = {name: sha256 for name, sha256 in subject.parents.items() if name != "teacher"}
    depends_on: dict[str, Any] = {
        "arm": arm,
        "parents": parents if arm == "ptq" else parents.get("float"),
        "scheme": subject.scheme.to_dict() if arm == "ptq" and subject.scheme else None,
        "calibration": subject.calibration if arm == "ptq" else None,
        "network": module.hparams["network"],
        "dataset": data.index.dataset_info(),
        "samples": [data.index.sample_token(row) for row in data.eval_rows.tolist()],
        "data": data.evaluation_config.to_dict(),
        "postprocessing": postprocessing_sha256(module.post_processing, module.test_time_flip),
        **({} if data.task == NUSCENES else {"classes": data.task.to_dict()}),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _evaluate(arm: str, trainer: Trainer, module: CenterPointDetector, data: NuScenesDataModule) -> Score:
    title = f"Scoring the {arm} baseline (batches)" if trainer.is_global_zero else None
    with quantizers_off(module.network) if arm == "float" else nullcontext():
        return score_detector(module, data, title, trainer.global_rank, trainer.world_size)


def _read(file: Path, task: DetectionTask) -> Score | None:
    """A score that was kept; None, with a line that says so, where its file is damaged."""
    try:
        kept = read_json(file, "baseline")
        kind: TypeAdapter[Score] = TypeAdapter(keys(dict.fromkeys(compared_metrics(task), _SHARE)))
        score = validated(kind, kept, f"baseline {str(file)!r}")
        unsealed(kept, f"baseline {str(file)!r}")
    except UserError as error:
        rank_zero_warn(f"{error}; it is scored again")
        return None
    if SEAL not in kept:
        rank_zero_warn(f"baseline {str(file)!r} has no checksum: it is taken as it is")
    return score


def _write(file: Path, score: Score) -> None:
    """Keep a score, where that can be done: it was worth its time, and the next run may do without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(sealed(score)))
    except (OSError, UserError) as error:  # a full disk is a UserError
        why = error if isinstance(error, UserError) else error.strerror
        rank_zero_warn(f"a baseline's score is not kept in {str(file.parent)!r} ({why})")
