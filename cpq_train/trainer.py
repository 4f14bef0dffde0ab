"""A Trainer whose further methods are verbs of the command line."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console

from cpq_train.detector import CenterPointDetector
from cpq_train.errors import UserError
from cpq_train.quantization.calibration import check_ranges


class QuantTrainer(Trainer):
    """Lightning's Trainer, and `calibrate`."""

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: Path,
        ranges: Path | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Find activation ranges for float weights and write a PTQ checkpoint.

        Args:
            model: The detector; `model.weights` names the float checkpoint, `model.scheme` what to quantize
                how.
            datamodule: Gives `data.num_calibration_samples` training samples without augmentation.
            output: Where to write the PTQ checkpoint.
            ranges: A checkpoint with amax of NVIDIA's CenterPoint or of pytorch-quantization: its ranges are
                taken, and samples are only used for the quantizers that it leaves without. Names that match
                nothing are listed.
            ckpt_path: Not used: calibration starts from `model.weights`.
            weights_only: Not used; accepted so that the configuration of a fit feeds this verb too.

        Raises:
            UserError: No weights or no scheme is given, there are no samples, or a range came out unfit.
        """
        assert isinstance(model, CenterPointDetector)
        if model.weights is None or ckpt_path is not None:
            raise UserError("calibrate starts from model.weights, a float checkpoint, not from --ckpt_path")
        model.arm = "ptq"
        model.trainer = self
        self.strategy.connect(model)
        datamodule.prepare_data()
        model.configure_model()
        model.to(self.strategy.root_device)
        model.calibrate(datamodule, ranges)
        num_zero = check_ranges(model.network)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.save_checkpoint(output, weights_only=True)
        zero = f", {num_zero} output channels are all zero" if num_zero else ""
        Console().print(f"PTQ checkpoint: {output}{zero}")
