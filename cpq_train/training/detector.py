"""The LightningModule: CenterPoint in one of the four arms, its training step and its detections."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer
from typing_extensions import Self, override

from cpq_train.arms.calibration import CalibrationSamples, calibrate
from cpq_train.arms.coverage import coverage_table
from cpq_train.arms.loading import fold_checkpoint
from cpq_train.arms.starting_point import CalibrationConfig
from cpq_train.arms.teacher import Teacher, find_teacher
from cpq_train.common.arm_names import Arm
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.export.engine import Engine
from cpq_train.models import HeadOutput, NetworkConfig
from cpq_train.models.code_weights import Ancestor, resolve_code_weights
from cpq_train.models.decode import Detections, PostProcessing, decode
from cpq_train.models.distillation import DistillationConfig
from cpq_train.models.flip_averaging import Network, check_flippable, flip_averaged
from cpq_train.quantization.batchnorm import (
    BatchNormPolicy,
)
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.ranges.bias_steps import check_biases, widen_steps
from cpq_train.quantization.ranges.calibration import static_ranges
from cpq_train.quantization.ranges.policy import RangePolicy, range_parameters
from cpq_train.quantization.ranks import check_equal_over_ranks, sum_over_ranks
from cpq_train.quantization.switches import GradientPrecision, compute_gradients_in
from cpq_train.resilience.nonfinite import nonfinite_loss
from cpq_train.training.arm_module import ArmModule
from cpq_train.training.finite_steps import FiniteSteps, prepare_to_skip
from cpq_train.training.host_targets import HostTargets
from cpq_train.training.losses import training_losses
from cpq_train.training.moving_ranges import MovingRanges
from cpq_train.training.optim import OptimizerConfig, new_optimizer
from cpq_train.training.settings import plain, reaching
from cpq_train.training.strategy import check_batch_statistics

Batch = dict[str, Any]

FOLDED_FILE = "folded.ckpt"
"""The last checkpoint with BatchNorm folded, beside it; written where BatchNorm was kept in training."""


class CenterPointDetector(HostTargets, ArmModule):
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
        engine_file: Deployment file of `export` that validate, test and predict run in the network's place;
            `weights` may name the checkpoint that it has to come from.
        weights_parts: Modules of `weights` that a float network starts its training with, such as
            [backbone_3d, backbone_2d, dense_head.shared_conv]; the rest is fresh, and its classes may be
            others. Null is all of it.
        gradients: Precision of the gradients of quantized dense convolutions: fp32, or bf16, which is faster
            where the processor has it and as good as that of mixed precision. Forward is the same.
    """

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
        engine_file: str | None = None,
        weights_parts: list[str] | None = None,
        gradients: GradientPrecision = "fp32",
    ) -> None:
        post_processing = reaching(post_processing, network)
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if test_time_flip:
            check_flippable(network)
        self.code_weights, self.loc_weight = resolve_code_weights(code_weights), loc_weight
        self.save_hyperparameters({**plain(settings), "code_weights": list(self.code_weights)}, logger=False)
        self.network_config = network
        self.weights, self.weights_parts = weights, weights_parts
        self.arm, self.scheme_file = arm, scheme
        self.batchnorm, self.ranges = batchnorm, ranges
        self.engine_file, self.engine = engine_file, None
        self.post_processing, self.test_time_flip = post_processing, test_time_flip
        self.optimizer, self.gradients = optimizer, gradients
        self.calibration = calibration
        self.distillation = distillation
        self._teacher: Teacher | None = None
        self._moving_ranges = MovingRanges(ranges)
        self._finite_steps = FiniteSteps()
        self._evaluation = ExitStack()

    @classmethod
    def of_engine(cls, file: Path) -> Self:
        """The detector that runs a deployment file, with the settings of its sidecar.

        Raises:
            UserError: See `Engine`.
        """
        engine = Engine(file)
        post_processing = PostProcessing(**engine.sidecar.post_processing)
        detector = cls(engine.config, post_processing=post_processing, engine_file=str(file))
        detector.engine = engine
        return detector

    @override
    def forward(self, batch: Batch) -> list[HeadOutput]:
        """Raw outputs of every head for a batch of voxels."""
        return self._run(self.engine or self.network, batch)

    def _run(self, network: Network | nn.Module, batch: Batch) -> list[HeadOutput]:
        batch = self.to_device(batch)
        heads: list[HeadOutput] = network(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])
        return heads

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, whose mean over the ranks is that of all their samples; logs it with its parts."""
        losses = training_losses(self.network, batch, self.code_weights, self.loc_weight, self._teacher)
        self._log_losses(losses, batch["batch_size"])
        where = f"step {self.global_step}, batch {batch_idx} of the epoch, rank {self.global_rank}"
        explain = partial(nonfinite_loss, self.network, lambda: self(batch), batch=batch, where=where)
        return self._finite_steps.see_loss(losses, explain, self._looks_late)

    @property
    def _looks_late(self) -> bool:
        """Whether the host does not wait to see if a step is finite; a gradient scaler looks for itself."""
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return not are_numbers_at_hand(self.device) and not has_scaler

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

    @override
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
        plain: Network = self.engine or self.network
        network = flip_averaged(plain, config) if self.test_time_flip else plain
        with torch.autocast(self.device.type, enabled=False):
            heads = self._run(network, batch)
            return decode(heads, config, self.post_processing)

    @override
    def on_fit_start(self) -> None:
        """Calibrate if the arm is quantized and started from float weights; ranks must agree on ranges."""
        if self.subject.arm == "ptq":
            raise UserError("model.arm is 'ptq', which is not trained; fit makes float, float_tuned or qat")
        if self.gradients != "fp32" and self.subject.arm != "qat":
            raise UserError(
                f"model.gradients is {self.gradients!r}, which quantized layers have, and model.arm is "
                f"{self.subject.arm!r}; accepted: fp32, and trainer.precision bf16-mixed"
            )
        compute_gradients_in(self.network, self.gradients)
        if self.distillation is not None:
            self._teacher = find_teacher(self.distillation, self.subject, self.weights, self.is_resuming)
        if self.subject.needs_calibration:
            self.calibrate(self.trainer.datamodule)  # type: ignore[attr-defined]
        elif self.is_global_zero:
            print_plain(coverage_table(self.subject.prepared))
        check_equal_over_ranks(static_ranges(self.network))
        self.on_validation_epoch_end()  # of a fit that an exception ended
        self.freeze_batchnorm()
        if self.trainer.world_size > 1:
            check_batch_statistics(self.network, self.device)

    def calibrate(self, samples: CalibrationSamples, given: Mapping[str, Tensor] | None = None) -> None:
        """Find the activation ranges, see `cpq_train.arms.calibration.calibrate`.

        Args:
            samples: The data module.
            given: Ranges known already, by their names in the network's state dict.
        """
        calibrate(self.subject, samples, self._run, self.calibration, given, self.is_global_zero)

    @override
    def on_train_start(self) -> None:
        """The optimizers are restored by now."""
        for optimizer in self.trainer.optimizers:
            prepare_to_skip(optimizer, self.device)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `ArmModule`; nothing is saved behind a step that was not finite."""
        self._finite_steps.check()
        super().on_save_checkpoint(checkpoint)

    @override
    def on_train_end(self) -> None:
        """The last step was finite, and ranks that moved or learned ranges must still agree on them."""
        self._finite_steps.check()
        learned = {name: p for name, p in self.network.named_parameters() if name.endswith("_log_amax")}
        check_equal_over_ranks({**static_ranges(self.network), **learned})

    @override
    def on_fit_end(self) -> None:
        """Where BatchNorm was kept, write what is deployed: the last checkpoint with BatchNorm folded."""
        last = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        is_kept = self.subject.arm != "float" and self.subject.batchnorm != "folded"
        if is_kept and last and self.trainer.is_global_zero:
            fold_checkpoint(self.network_config, last, Path(last).with_name(FOLDED_FILE))

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """In a step in which ranges move, let the quantizers look at its tensors."""
        self._moving_ranges.begin_batch(self.network, self.global_step)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and move the ranges towards what the quantizers saw: once, before any callback saves them."""
        super().optimizer_step(*args, **kwargs)
        self._moving_ranges.move(self.network)

    @override
    def on_validation_start(self) -> None:
        """Refuse to score a network whose ranges were never found, or whose layers cannot hold their bias."""
        if self.engine is not None:
            return
        self._finite_steps.check()
        self._moving_ranges.move(self.network)  # between accumulated batches: validation is not observed
        if self.subject.needs_calibration:
            raise UserError(
                f"model.weights {self.weights!r} has no activation ranges: run calibrate first, "
                "or set model.arm to float"
            )
        if self.trainer.state.fn == "fit":
            widen_steps(self.network)  # biases may have grown
        check_biases(self.network)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    @override
    def on_validation_epoch_start(self) -> None:
        """Nothing is written until the epoch ends: callbacks that swap weights for averages have done so."""
        if self.engine is None:
            self.on_validation_epoch_end()
            self._evaluation.enter_context(frozen(self.network))

    @override
    def on_validation_epoch_end(self) -> None:
        """Weights and ranges may be written to again; callbacks may have put the trained ones back by now."""
        with suppress(UserError):
            self._evaluation.close()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def to_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on the network's device; pinned ones travel while the step starts."""
        return {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
        }

    @override
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
        where = f"step {self.global_step}, rank {self.global_rank}"
        norm = self._finite_steps.see_gradients(self, optimizer, where, self._looks_late)
        self.log("train/grad_norm", norm)
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val is not None:
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped once per batch; learned ranges are a group of their own."""
        steps = int(self.trainer.estimated_stepping_batches)
        ranges = range_parameters(self.network)
        learned = set(map(id, ranges))
        weights = [p for p in self.parameters() if p.requires_grad and id(p) not in learned]
        optimizer, schedule = new_optimizer(weights, self.optimizer, steps, ranges, self.ranges.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
