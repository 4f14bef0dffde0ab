"""The LightningModule: CenterPoint in one of the four arms, its training step and its detections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer
from typing_extensions import Self

from cpq_train.arms.recipe import coverage_table
from cpq_train.arms.starting_point import Batches, CalibrationConfig, improve
from cpq_train.arms.subject import (
    Arm,
    Subject,
    build,
    check_state,
    fold_checkpoint,
    from_description,
    from_weights,
    needs_calibration,
    set_range_policy,
)
from cpq_train.arms.teacher import Teacher, find_teacher
from cpq_train.common.checkpoint import network_state
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, HeadOutput, NetworkConfig
from cpq_train.models.code_weights import Ancestor, resolve_code_weights
from cpq_train.models.decode import Detections, PostProcessing, decode
from cpq_train.models.distillation import DistillationConfig
from cpq_train.models.flip_averaging import Network, check_flippable, flip_averaged
from cpq_train.models.losses import center_loss
from cpq_train.models.targets import assign_targets
from cpq_train.quantization.batchnorm import (
    BatchNormPolicy,
    freeze_batchnorm,
    joins_batches_of_ranks,
    trains_on_parts_of_a_batch,
)
from cpq_train.quantization.health import Problem, refuse, table
from cpq_train.quantization.prepare import leave_in_float
from cpq_train.quantization.ranges.calibration import collecting_ranges, static_ranges
from cpq_train.quantization.ranges.policy import (
    RangePolicy,
    finish_observing,
    range_parameters,
    start_observing,
)
from cpq_train.quantization.ranks import check_equal_over_ranks, sum_over_ranks
from cpq_train.quantization.scheme import Scheme
from cpq_train.resilience.nonfinite import nonfinite_loss
from cpq_train.training.optim import OptimizerConfig, gradient_norm, new_optimizer

Batch = dict[str, Any]

FOLDED_FILE = "folded.ckpt"
"""The last checkpoint with BatchNorm folded, beside it; written where BatchNorm was kept in training."""


class CenterPointDetector(LightningModule):
    """CenterPoint-Voxel, float or quantized.

    Args:
        network: Sizes of the network.
        weights: Checkpoint to start from (its weights, and its ranges where it is quantized). To resume a
            run, or to load a finished one, use `--ckpt_path` instead.
        arm: float, float_tuned, ptq or qat; null is what `weights` is, or float without weights.
        scheme: YAML file that says what to quantize how; null takes that of `weights`.
        batchnorm: folded, frozen, or trained and folded behind training; null is what `weights` has, and
            folded where a float network becomes another arm.
        ranges: What becomes of the ranges while the qat arm trains.
        code_weights: Loss weight of each of the ten numbers of a box code, or the ancestor whose weights are
            taken: openpcdet (0.2 on cosine and sine of the yaw), tianweiy or mmdet3d (0.2 on the velocity).
        loc_weight: Weight of the box losses against the heat-map losses.
        post_processing: From heat maps to boxes; the same for every arm that is compared.
        test_time_flip: Detect in each scene and its three mirror images and average, at four times the cost.
        optimizer: Learning rate and schedule.
        calibration: What calibration does beyond finding ranges.
        distillation: What a qat or float_tuned network also learns from a float one; null is nothing.
    """

    network: CenterPoint  # built by `configure_model`

    def __init__(
        self,
        network: NetworkConfig = NetworkConfig(),  # noqa: B008 - frozen, and shown in the command's help
        weights: str | None = None,
        arm: Arm | None = None,
        scheme: str | None = None,
        batchnorm: BatchNormPolicy | None = None,
        ranges: RangePolicy = RangePolicy(),  # noqa: B008
        code_weights: Ancestor | tuple[float, ...] = "openpcdet",
        loc_weight: float = 0.25,
        post_processing: PostProcessing = PostProcessing(),  # noqa: B008
        test_time_flip: bool = False,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008
        distillation: DistillationConfig | None = None,
    ) -> None:
        super().__init__()
        if test_time_flip:
            check_flippable(network)
        self.code_weights, self.loc_weight = resolve_code_weights(code_weights), loc_weight
        self.save_hyperparameters(
            {
                "network": asdict(network),
                "weights": weights,
                "arm": arm,
                "scheme": scheme,
                "batchnorm": batchnorm,
                "ranges": asdict(ranges),
                "code_weights": list(self.code_weights),
                "loc_weight": loc_weight,
                "post_processing": asdict(post_processing),
                "test_time_flip": test_time_flip,
                "optimizer": asdict(optimizer),
                "calibration": asdict(calibration),
                "distillation": distillation and asdict(distillation),
            },
            logger=False,
        )
        self.network_config = network
        self.weights, self.arm, self.scheme_file = weights, arm, scheme
        self.batchnorm, self.ranges = batchnorm, ranges
        self.post_processing, self.test_time_flip = post_processing, test_time_flip
        self.optimizer = optimizer
        self.calibration = calibration
        self.distillation = distillation
        self.subject: Subject | None = None
        self._teacher: Teacher | None = None
        self._observed_step: int | None = None

    def configure_model(self) -> None:
        """Build the arm from `weights`, once; a checkpoint that is resumed brings its own structure later."""
        if self.subject is not None:
            return
        scheme = None if self.scheme_file is None else Scheme.from_file(self.scheme_file)
        arm = self.arm or "float"
        if self.weights is not None and not self._is_resuming():
            self._adopt(from_weights(self.network_config, self.weights, self.arm, scheme, self.batchnorm))
        elif arm == "float" or self._is_resuming():
            self.configure_untrained()
        else:
            raise UserError(f"model.arm {arm!r} starts from a checkpoint: give model.weights")
        # Here and not when fitting starts: the optimizer and DDP are set up in between.
        if self.subject is not None and self.subject.arm == "qat" and not self._is_resuming():
            set_range_policy(self.subject, self.ranges.amax)

    def configure_untrained(self) -> None:
        """Build the arm with fresh weights, without ranges: for a checkpoint to fill, or to be measured."""
        scheme = None if self.scheme_file is None else Scheme.from_file(self.scheme_file)
        self._adopt(build(self.network_config, self.arm or "float", scheme, self.batchnorm))

    def _is_resuming(self) -> bool:
        return self._trainer is not None and self._trainer.ckpt_path is not None

    def _adopt(self, subject: Subject) -> None:
        self.subject = subject
        subject.network.dense_channels_last()
        self.network = subject.network
        self._freeze_batchnorm()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say what it is."""
        assert self.subject is not None
        checkpoint["quantization"] = self.subject.describe()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take on the structure that the checkpoint describes, before its tensors are loaded."""
        if "quantization" not in checkpoint:
            raise UserError(
                "--ckpt_path: the file does not say what it is (no 'quantization'); use model.weights"
            )
        self._adopt(from_description(self.network_config, checkpoint["quantization"]))
        check_state(self.network, network_state(checkpoint), "--ckpt_path")
        self.to(self.device)

    def forward(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Raw outputs of every head for a batch of voxels."""
        return self._run(self.network, batch)

    def _run(self, network: Network, batch: Batch) -> list[dict[str, Tensor]]:
        batch = self.to_device(batch)
        heads: list[dict[str, Tensor]] = network(
            batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]
        )
        return heads

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, whose mean over the ranks is that of all their samples; logs it with its parts."""
        targets = assign_targets(batch["gt_boxes"], self.network_config)
        heads, distilled = self._run_with_teacher(batch)
        losses = center_loss(heads, targets, self.code_weights, self.loc_weight, sum_over_ranks)
        if distilled:
            losses = {**losses, **distilled, "loss": torch.stack([losses["loss"], *distilled.values()]).sum()}
        self._log_losses(losses, batch["batch_size"])
        if not torch.isfinite(losses["loss"]):  # waits for the device, once per step
            where = f"step {self.global_step}, batch {batch_idx} of the epoch, rank {self.global_rank}"
            raise nonfinite_loss(self.network, lambda: self(batch), losses, batch, where)
        return losses["loss"]

    def _log_losses(self, losses: Mapping[str, Tensor], batch_size: int) -> None:
        values = torch.stack([value.detach() for value in losses.values()])
        if self._is_log_step():
            values = sum_over_ranks(values) / self.trainer.world_size
        named = dict(zip(losses, values.unbind(), strict=True))
        self.log("train/loss", named.pop("loss"), prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in named.items()}, batch_size=batch_size)

    def _is_log_step(self) -> bool:
        """Whether loggers get what is logged now."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def _run_with_teacher(self, batch: Batch) -> tuple[list[HeadOutput], dict[str, Tensor]]:
        """Raw outputs of every head and, where there is a teacher, its parts of the loss."""
        if self._teacher is None:
            return self(batch), {}
        return self._teacher.instruct(self.network, batch, self.code_weights, sum_over_ranks)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Detections]]:
        """Detections of each sample, for the evaluation callback."""
        return {"detections": self.detect(batch)}

    test_step = validation_step
    predict_step = validation_step

    def detect(self, batch: Batch) -> list[Detections]:
        """Boxes, scores and labels of each sample of a batch, in the LiDAR frame.

        In fp32 whatever the trainer's precision: scores of all arms and baselines are comparable.
        """
        config = self.network_config
        network = flip_averaged(self.network, config) if self.test_time_flip else self.network
        with torch.autocast(self.device.type, enabled=False):
            heads = self._run(network, batch)
            return decode(heads, config, self.post_processing)

    def on_fit_start(self) -> None:
        """Calibrate if the arm is quantized and started from float weights; ranks must agree on ranges."""
        assert self.subject is not None
        if self.subject.arm == "ptq":
            raise UserError("model.arm is 'ptq', which is not trained; fit makes float, float_tuned or qat")
        if self.distillation is not None:
            self._teacher = find_teacher(self.distillation, self.subject, self.weights, self._is_resuming())
        if needs_calibration(self.subject):
            self.calibrate(self.trainer.datamodule)  # type: ignore[attr-defined]
        else:
            self.print_coverage()
        check_equal_over_ranks(static_ranges(self.network))
        self._freeze_batchnorm()
        if self.trainer.world_size > 1:
            self._check_batch_statistics()

    def _check_batch_statistics(self) -> None:
        if joins_batches_of_ranks(self.network) and self.device.type != "cuda":
            raise UserError(f"trainer.sync_batchnorm is true on {self.device.type}; accepted: false, or CUDA")
        if trains_on_parts_of_a_batch(self.network):
            rank_zero_warn(
                "BatchNorm trains on each rank's own samples; trainer.sync_batchnorm (CUDA only) joins them"
            )

    def on_train_end(self) -> None:
        """Ranks that moved or learned ranges must still agree on them."""
        learned = {name: p for name, p in self.network.named_parameters() if name.endswith("_log_amax")}
        check_equal_over_ranks({**static_ranges(self.network), **learned})

    def on_fit_end(self) -> None:
        """Where BatchNorm was kept, write what is deployed: the last checkpoint with BatchNorm folded."""
        last = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        assert self.subject is not None
        is_kept = self.subject.arm != "float" and self.subject.batchnorm != "folded"
        if is_kept and last and self.trainer.is_global_zero:
            fold_checkpoint(self.network_config, last, Path(last).with_name(FOLDED_FILE))

    def train(self, mode: bool = True) -> Self:
        """As of any module; a frozen BatchNorm stays in evaluation."""
        super().train(mode)
        self._freeze_batchnorm()
        return self

    def _freeze_batchnorm(self) -> None:
        if self.subject is not None and self.subject.batchnorm == "frozen":
            freeze_batchnorm(self.network)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """In a step in which ranges move, let the quantizers look at its tensors, all accumulated batches."""
        if self._observed_step is None and self.ranges.moves_at(self.global_step):
            self._observed_step = self.global_step
            start_observing(self.network)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and move the ranges towards what the quantizers saw: once, before any callback saves them."""
        super().optimizer_step(*args, **kwargs)
        if self._observed_step is not None:
            self._move_ranges()

    def _move_ranges(self) -> None:
        finish_observing(self.network, self.ranges.momentum)
        self._observed_step = None

    def on_validation_start(self) -> None:
        """Refuse to score a network whose ranges were never found."""
        if self._observed_step is not None:  # between accumulated batches; what is validated is not observed
            self._move_ranges()
        assert self.subject is not None
        if needs_calibration(self.subject):
            raise UserError(
                f"model.weights {self.weights!r} has no activation ranges: run calibrate first, "
                "or set model.arm to float"
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def calibrate(self, datamodule: LightningDataModule, given: Mapping[str, Tensor] | None = None) -> None:
        """Find the activation ranges on the data module's calibration samples, each seen by one rank.

        Args:
            datamodule: Gives the samples, where any are needed.
            given: Ranges known already, by their names in the network's state dict.

        Raises:
            UserError: There are no such samples, or a range came out unfit and the scheme has it an error.
        """
        assert self.subject is not None
        assert self.subject.scheme is not None
        self.print_coverage()
        given = dict(given or {})
        self.network.load_state_dict(given, strict=False)
        samples: dict[str, Any] = {"num_samples": 0}
        if not given or needs_calibration(self.subject):
            self._collect_ranges(datamodule.calibration_dataloader())  # type: ignore[attr-defined]
            self.network.load_state_dict(given, strict=False)
            samples = datamodule.calibration_info()  # type: ignore[attr-defined]
        self.subject.calibration = {
            "method": self.subject.scheme.input.method,
            **samples,
            "source_sha256": self.subject.parents.get("float"),
            "left_in_float": list(self.subject.prepared.left_in_float),
            **self._improve(datamodule.calibration_dataloader),  # type: ignore[attr-defined]
        }

    def _collect_ranges(self, loader: Iterable[Batch]) -> None:
        with collecting_ranges(self.network, self._on_unfit_ranges):
            for batch in track(loader, "Calibrating", disable=not self._is_global_zero()):
                self(batch)

    def _improve(self, new_loader: Callable[[], Batches]) -> dict[str, Any]:
        assert self.subject is not None
        return improve(self.subject, new_loader, self._run, self.calibration, self._is_global_zero())

    def _on_unfit_ranges(self, problems: list[Problem]) -> None:
        """What the scheme has done about unfit ranges: an error, or a warning and layers left in float."""
        subject = self.subject
        assert subject is not None
        assert subject.scheme is not None
        if subject.scheme.on_unfit_range == "error":
            refuse(problems)
        subject.scheme = leave_in_float(self.network, subject.prepared, subject.scheme, problems)
        if self._is_global_zero():
            text = f"warning: {len(subject.prepared.left_in_float)} layers stay float:\n{table(problems)}"
            Console(soft_wrap=True).print(text, style="yellow", markup=False, highlight=False)
        self.print_coverage()

    def print_coverage(self) -> None:
        """Print how many layers of each kind are quantized, at what bits, and which stay float."""
        if self.subject is not None and self._is_global_zero():
            Console().print(coverage_table(self.subject.prepared))

    def to_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on the network's device; pinned ones travel while the step starts."""
        return {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
        }

    def _is_global_zero(self) -> bool:
        return self._trainer is None or self._trainer.is_global_zero

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients, by then those of all ranks and accumulated batches; logs their norm before.

        Raises:
            UserError: Their norm is not finite; no weight has been touched.
        """
        norm = gradient_norm(self.named_parameters())
        self.log("train/grad_norm", norm)
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val is not None:
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped once per batch; learned ranges are a group of their own."""
        steps = int(self.trainer.estimated_stepping_batches)
        ranges = range_parameters(self.network)
        learned = set(map(id, ranges))
        weights = [p for p in self.parameters() if p.requires_grad and id(p) not in learned]
        optimizer, schedule = new_optimizer(weights, self.optimizer, steps, ranges, self.ranges.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
