"""A Trainer whose further methods are verbs of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor

from cpq_train.common.arm_names import Arm
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output, check_writable
from cpq_train.common.lightning_private import HookedTrainer
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.interop.foreign_ranges import match_ranges, read_ranges
from cpq_train.loggers.start import logged_calibration
from cpq_train.quantization.ranges.calibration import check_ranges
from cpq_train.resilience.trainer import ResilientTrainer
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.strategy import QuantDDPStrategy
from cpq_train.verbs.profile import profile
from cpq_train.verbs.profile_input import ProfileSettings
from cpq_train.verbs.profile_several import profile_several
from cpq_train.verbs.sensitivity import SensitivitySettings, analyse

PRECISIONS = ("32-true", "bf16-mixed")

# What `trainer.strategy` auto (on several devices) and ddp mean; Lightning's own class has its class path.
StrategyRegistry.register(
    "ddp", QuantDDPStrategy, "DDP that leaves ranges alone", override=True, gradient_as_bucket_view=True
)


class QuantTrainer(ResilientTrainer):
    """The Trainer, and the verbs `calibrate`, `sensitivity` and `profile`.

    Args:
        *args: Of Trainer.
        limit_train_batches: How many training batches to take in an epoch; 1 is one, 1.0 is all.
        limit_val_batches: How many validation batches to take; a partial score leaves no metrics.json.
        limit_test_batches: How many batches `test` takes.
        limit_predict_batches: How many batches `predict` takes.
        val_check_interval: Batches, or the share of an epoch, from one validation to the next.
        **kwargs: Of Trainer.

    Raises:
        UserError: The precision is none of `PRECISIONS`. Gradients overflow fp16, and true half precision
            rounds ranges and weights. Quantization is computed in fp32 in any case.
    """

    # Python keeps one of Optional[Union[int, float]] and Optional[Union[float, int]], whichever it makes
    # first. Where that is the other one, Lightning's own annotations make 1.0 of a 1 on the command line.
    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("barebones"):
            raise UserError(
                "trainer.barebones is true, which means no checkpoints, loggers or callbacks; accepted: false"
            )
        with _naming_devices(kwargs):
            super().__init__(
                *args,
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                val_check_interval=val_check_interval,
                **kwargs,
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"trainer.precision is {self.precision!r}; accepted: {', '.join(PRECISIONS)}")

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: Path,
        ranges_file: Path | None = None,
    ) -> None:
        """Find activation ranges for float weights and write a PTQ checkpoint.

        Args:
            model: The detector; `model.weights` names the float checkpoint, `model.scheme` what to quantize
                how.
            datamodule: Gives `data.num_calibration_samples` training samples without augmentation.
            output: Where to write the PTQ checkpoint.
            ranges_file: Checkpoint of NVIDIA's CenterPoint or another made with pytorch-quantization, whose
                ranges are taken; samples are only used for the quantizers that it leaves without.

        Raises:
            UserError: No weights or no scheme is given, there are no samples, `ranges_file` holds no range,
                or a range came out unfit.
        """
        assert isinstance(model, CenterPointDetector)
        assert isinstance(datamodule, NuScenesDataModule)
        model.refuse_engine()
        model.refuse_parts()
        if model.weights is None:
            raise UserError("calibrate starts from model.weights, a float checkpoint, not from --ckpt_path")
        check_output(output)
        self._on_every_rank(self._calibrate, model, datamodule, output, ranges_file)

    def _calibrate(
        self,
        model: CenterPointDetector,
        datamodule: NuScenesDataModule,
        output: Path,
        ranges_file: Path | None,
    ) -> None:
        self._connect(model, datamodule, "ptq")
        with logged_calibration(self, model, datamodule, output):
            given = None if ranges_file is None else _ranges_of(ranges_file, model)
            model.calibrate(datamodule, given)
            num_zero = check_ranges(model.network)
            output.parent.mkdir(parents=True, exist_ok=True)
            self.save_checkpoint(output, weights_only=True)
        if self.is_global_zero:
            zero = f", {num_zero} output channels are all zero" if num_zero else ""
            print_plain(f"PTQ checkpoint: {output}{zero}")

    def _on_every_rank(
        self,
        verb: Callable[..., None],
        model: CenterPointDetector,
        datamodule: LightningDataModule,
        *args: Any,
    ) -> None:
        """Run a verb in the processes of the strategy, which are started where they are not running yet.

        The data are prepared before that, once per node, so that no process waits for one that failed.
        """
        if self.local_rank == 0:
            datamodule.prepare_data()
        launcher = self.strategy.launcher
        if launcher is None:
            verb(model, datamodule, *args)
        else:
            launcher.launch(verb, model, datamodule, *args, trainer=self)

    def _connect(self, model: CenterPointDetector, datamodule: LightningDataModule, arm: Arm) -> None:
        """Join the ranks, and build an arm on the device."""
        model.trainer = datamodule.trainer = self
        self.datamodule = datamodule  # its settings go into the checkpoint
        self.strategy.connect(model)
        self.strategy.setup_environment()
        model.start_as(arm)
        self.strategy.model_to_device()

    def sensitivity(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: Path,
        by: Literal["block", "layer"] = "block",
        bits: Sequence[int] = (8, 4),
        input_bits: Sequence[int] | None = None,
        budget_mib: float | None = None,
        budget_bit_macs: float | None = None,
        metric: Literal["proxy", "nds"] = "proxy",
        num_samples: int = 8,
    ) -> None:
        """Measure what each part loses to quantization and write a mixed-precision scheme within a budget.

        A unit is quantized alone and left out alone, for each choice of bits. The loss is the divergence of
        the heads from the float network's at its objects: heat maps, plus `model.loc_weight` times boxes. The
        scheme is the one whose units' losses, each alone, have the least sum; what it measures stands beside.
        Writes `sensitivity.json`, `sensitivity.png`, `schemes/` (the uniform schemes), with a budget
        `scheme.yaml`, and `measurements.jsonl`, from which an interrupted or repeated run goes on.

        Args:
            model: The detector; `model.weights` names the float checkpoint, `model.scheme` gives everything
                but the bits. What it leaves in float stays float.
            datamodule: Gives the samples for calibration and comparison.
            output: Folder of the results.
            by: What gets bits of its own: a block (such as a residual block or a level) or a layer.
            bits: Weight bits to choose from; float is always a choice.
            input_bits: Input bits that go with each of `bits`; null keeps those of the scheme.
            budget_mib: What the weights may take, in MiB at the bits they are stored with (float: 32).
            budget_bit_macs: What multiply-accumulates times bits of weight times bits of input may be, as a
                share of the float network's (32 x 32).
            metric: proxy, or nds to score mAP and NDS on the validation samples too, at every step.
            num_samples: Training samples on which outputs are compared.

        Raises:
            UserError: Weights or scheme are missing or unfit, settings contradict one another, or the budget
                cannot be met.
        """
        assert isinstance(model, CenterPointDetector)
        assert isinstance(datamodule, NuScenesDataModule)
        model.refuse_engine()
        model.refuse_parts()
        if self.world_size != 1:
            raise UserError(f"sensitivity runs on one device, not {self.world_size}: set --trainer.devices 1")
        settings = SensitivitySettings(
            output, by, bits, input_bits, budget_mib, budget_bit_macs, metric, num_samples
        )
        check_writable(output, "output")
        datamodule.prepare_data()
        analyse(model, datamodule, settings, self.strategy.root_device)

    def profile(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: Path | None = None,
        sample: str | None = None,
        cloud: Path | None = None,
        num_passes: int = 5,
        trace: bool = False,
        training_step: bool = False,
        checkpoints: Sequence[Path] = (),
        engine_file: Path | None = None,
    ) -> None:
        """Measure time, memory and storage of every layer on one cloud, and print tables of them.

        Time is that of an evaluation pass with one sample, from voxels to boxes; memory is
        that of the forward pass of training. The cloud is made up unless `sample` or `cloud` names one.
        Several checkpoints are also timed in turn: only such times can be compared.

        Args:
            model: The detector; without `model.weights` it has fresh weights, and a quantized one without
                ranges takes them from this cloud: times and sizes hardly depend on either, boxes do.
            datamodule: Gives grid and limits of voxels, and the sample where one is asked for.
            output: Folder for profile.json, latency.csv, memory.csv, storage.csv and modules.txt. In the run
                directory of a scored checkpoint its metrics.json gets the measurements too, for `compare`.
                With `checkpoints` it gets latency.json for `compare`, and a folder of these for each.
            sample: Token of a sample of the data set, or `first` for the first validation sample.
            cloud: File of float32 x, y, z, intensity, ring, as nuScenes has them.
            num_passes: Passes whose median is reported; as many run without hooks beside them.
            trace: Write trace.json too, for chrome://tracing or https://ui.perfetto.dev.
            training_step: Time the parts of training steps too: with `sample` on training batches, else on
                the cloud, without boxes; in training_step.json.
            checkpoints: Networks to measure instead of `model`; they say themselves what they are.
            engine_file: Deployment file to time with them, as `export` writes it.

        Raises:
            UserError: The cloud, the sample, a checkpoint or an argument is no good.
        """
        assert isinstance(model, CenterPointDetector)
        assert isinstance(datamodule, NuScenesDataModule)
        model.refuse_engine()
        model.refuse_parts()
        if self.world_size != 1:
            raise UserError(f"profile runs on one device, not {self.world_size}: set --trainer.devices 1")
        if checkpoints and model.weights is not None:
            raise UserError(
                f"checkpoints {', '.join(map(str, checkpoints))} and model.weights {model.weights} are both "
                "given: accepted: one of the two"
            )
        if output is not None:
            check_writable(output, "output")
        asked = output, sample, cloud, num_passes, trace, training_step, checkpoints, engine_file
        device = self.strategy.root_device
        self.accelerator.setup_device(device)
        datamodule.trainer = self  # training batches are those of its fit
        how = ProfileSettings(*asked), device, self.precision_plugin.forward_context, self._for_a_few_steps
        if checkpoints:
            profile_several(datamodule, *how)
        else:
            profile(model, datamodule, *how)

    def _for_a_few_steps(self, **settings: Any) -> HookedTrainer:
        """Another Trainer that makes the same steps, and leaves no files."""
        device = self.strategy.root_device
        return HookedTrainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=self.precision,
            gradient_clip_val=self.gradient_clip_val,
            gradient_clip_algorithm=self.gradient_clip_algorithm,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )


@contextmanager
def _naming_devices(asked: Mapping[str, Any]) -> Iterator[None]:
    """Say with what Lightning refuses what was asked for, and what this machine has."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError) as error:
        is_of_devices = re.search("accelerator|devices|nodes|strategy|gpu", str(error), re.IGNORECASE)
        if isinstance(error, UserError) or not is_of_devices:
            raise
        names = ("accelerator", "devices", "num_nodes", "strategy")
        settings = ", ".join(f"trainer.{name} {asked[name]}" for name in names if name in asked)
        raise UserError(f"{settings}: {error} This machine has {torch.cuda.device_count()} GPUs") from error


def _ranges_of(file: Path, model: CenterPointDetector) -> dict[str, Tensor]:
    """Take what fits of a file, and print every name that does not."""
    matched = match_ranges(read_ranges(file), model.network.state_dict())
    if model.trainer.is_global_zero:
        print_plain(matched.report())
    return matched.values
