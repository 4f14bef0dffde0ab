"""Fits of a toy network on drawn voxels through the real detector and trainer, on one rank or forked ones.

`run` makes a fit here, `run_in_a_process` makes some in a process of their own (this module as a program).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from cpq_train.arms.structure import build
from cpq_train.data.dataset import Item, SampleKey, collate
from cpq_train.data.samplers import TrainingSampler, dealt_batches
from cpq_train.models import NetworkConfig
from cpq_train.models.distillation import DistillationConfig
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.quantization.switches import quantizers
from cpq_train.training import detector, losses
from cpq_train.training.optim import OptimizerConfig
from cpq_train.training.strategy import QuantDDPStrategy
from cpq_train.verbs.trainer import QuantTrainer

DDP = {"gradient_as_bucket_view": True}

NETWORK = NetworkConfig(
    point_cloud_range=(-6.4, -3.2, -5.0, 6.4, 3.2, 3.0),
    backbone_3d_channels=(4, 4, 8, 8),
    backbone_3d_num_blocks=(1, 1, 1, 1),
    backbone_3d_out_channels=8,
    backbone_2d_num_layers=(1, 1),
    backbone_2d_channels=(8, 8),
    upsample_channels=(8, 8),
    head_channels=8,
    class_groups=(("car",), ("motorcycle", "bicycle")),
)


class DrawnData(LightningDataModule):
    """Samples drawn by their position; every third has no object, the others one to six."""

    def __init__(self, batch_size: int, num_samples: int) -> None:
        super().__init__()
        self.batch_size, self.num_samples = batch_size, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: SampleKey | int) -> Item:
        _, position = (0, key) if isinstance(key, int) else key
        generator = torch.Generator().manual_seed(position)
        x, y, z = NETWORK.grid_size
        cells = torch.randperm(x * y * z, generator=generator)[:300]
        boxes = torch.zeros(position % 3 * 3, 10)
        boxes[:, :2] = (torch.rand(len(boxes), 2, generator=generator) - 0.5) * torch.tensor([12, 6])
        boxes[:, 3:6] = torch.tensor([4.0, 2.0, 1.5])
        boxes[:, 9] = torch.tensor([1.0, 8.0, 9.0]).repeat(2)[: len(boxes)]
        return {
            "voxel_features": torch.randn(300, 5, generator=generator),
            "voxel_coords": torch.stack([cells // (y * x), cells // x % y, cells % x], 1).int(),
            "gt_boxes": boxes,
            "sample_row": position,
            "token": str(position),
        }

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader[Item]:
        rank, world_size = self._place()
        sampler = TrainingSampler(self, num_replicas=world_size, rank=rank, seed=0)
        return DataLoader(self, batch_size=self.batch_size, sampler=sampler, collate_fn=collate)

    def calibration_dataloader(self) -> DataLoader[Item]:
        batches = dealt_batches(4, self.batch_size, *self._place())
        return DataLoader(self, batch_sampler=batches, collate_fn=collate)

    def calibration_info(self) -> dict[str, Any]:
        return {"num_samples": 4}


class Record(Callback):
    """What a rank logged and saw at every step, and how often its ranges had been written to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.logged: list[dict[str, float]] = []
        self.batches: list[list[int]] = []
        self.versions: list[list[int]] = []
        self.sends_buffers: bool | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.sends_buffers = getattr(trainer.strategy.model, "broadcast_buffers", None)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.batches.append(batch["sample_rows"].tolist())
        found = quantizers(module).values()
        self.versions.append([q._amax._version for q in found if hasattr(q, "_amax")])

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(
            {
                "logged": self.logged,
                "batches": self.batches,
                "versions": self.versions,
                "state": module.state_dict(),
                "steps": trainer.global_step,
                "sends_buffers": self.sends_buffers,
            },
            self.file.with_suffix(f".{trainer.global_rank}.pt"),
        )


@dataclass(frozen=True)
class Fit:
    """One fit.

    Args:
        name: Its results are `OUTPUT/name.RANK.pt`, see `Record`.
        num_ranks: Forked processes, or this one.
        batch_size: Per rank.
        num_steps: Of the fit; the schedule's length.
        arm: float, qat or float_tuned.
        sums_over_ranks: False leaves out what joins the object counts of the ranks.
        distill: Whether a teacher takes part.
        ranges: Arguments of `RangePolicy`.
        batchnorm: Policy; null is the arm's own.
        lr: Largest learning rate.
        accelerator: Where the ranks run.
        trainer: Further arguments of the trainer.
    """

    name: str
    num_ranks: int = 1
    batch_size: int = 4
    num_steps: int = 50
    arm: str = "qat"
    sums_over_ranks: bool = True
    distill: bool = False
    ranges: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: str | None = None
    lr: float = 3e-5
    accelerator: str = "cpu"
    trainer: Mapping[str, Any] = field(default_factory=dict)


def float_checkpoint(folder: Path) -> Path:
    """Float weights that all fits start from; made once."""
    file = folder / "float.ckpt"
    if not file.exists():
        torch.manual_seed(0)
        subject = build(NETWORK, "float", None)
        state = {f"network.{name}": value for name, value in subject.network.state_dict().items()}
        torch.save({"state_dict": state, "quantization": subject.describe()}, file)
    return file


def run(fit: Fit, folder: Path, *more: Callback) -> dict[str, Any]:
    """Make one fit, with more callbacks; returns what rank 0 recorded."""
    joined = losses.sum_over_ranks
    losses.sum_over_ranks = joined if fit.sums_over_ranks else lambda values: values
    accumulated = fit.trainer.get("accumulate_grad_batches", 1)
    try:
        QuantTrainer(
            accelerator=fit.accelerator,
            devices=fit.num_ranks,
            strategy="auto" if fit.num_ranks == 1 else QuantDDPStrategy(start_method="fork", **DDP),
            max_steps=fit.num_steps,
            log_every_n_steps=1,
            logger=CSVLogger(folder, name=fit.name),
            callbacks=[Record(folder / fit.name), *more],
            default_root_dir=folder / fit.name,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **fit.trainer,
        ).fit(
            detector.CenterPointDetector(
                NETWORK,
                weights=str(float_checkpoint(folder)),
                arm=fit.arm,
                scheme=None if fit.arm == "float" else "configs/schemes/int8.yaml",
                batchnorm=fit.batchnorm,
                ranges=RangePolicy(**fit.ranges),
                optimizer=OptimizerConfig(lr=fit.lr, schedule="cosine"),
                distillation=DistillationConfig() if fit.distill else None,
            ),
            DrawnData(fit.batch_size, fit.num_steps * fit.batch_size * fit.num_ranks * accumulated),
        )
    finally:
        losses.sum_over_ranks = joined
    return torch.load(folder / f"{fit.name}.0.pt", weights_only=True)


def run_in_a_process(fits: list[Fit], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Make the fits in a new process, which may fork; returns what every rank of each recorded.

    A process that ran a backward pass cannot be forked any more: fits on one rank go last.
    """
    settings = folder / "fits.json"
    settings.write_text(json.dumps([dataclasses.asdict(fit) for fit in fits]))
    finished = subprocess.run(
        [sys.executable, __file__, str(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout
    files = {fit.name: [folder / f"{fit.name}.{rank}.pt" for rank in range(fit.num_ranks)] for fit in fits}
    return {
        name: [torch.load(file, weights_only=True, map_location="cpu") for file in of_ranks]
        for name, of_ranks in files.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        run(Fit(**settings), Path(sys.argv[1]).parent)
