"""A LightningModule whose network is one of the arms: how it comes from settings, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from typing_extensions import Self, override

from cpq_train.arms.description import Description
from cpq_train.arms.loading import from_content, from_weights, load
from cpq_train.arms.partial_start import start_with_parts
from cpq_train.arms.structure import build, set_range_policy
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import DEPLOYED, Arm, Row
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.lightning_private import trainer_of
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.settings import DATA_KEY
from cpq_train.data.splits import union
from cpq_train.export.engine import Engine
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy, freeze_batchnorm
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.quantization.scheme import Scheme
from cpq_train.training.features import check_features
from cpq_train.training.resuming import check_optimizer_state, check_same_run
from cpq_train.training.settings import DECIDED_BY_FILE, hyper_parameters, scheme_of, settings_of


class ArmModule(LightningModule):
    """What a detector does before its first batch, and with its checkpoints.

    Attributes:
        network: The network, that of `subject`.
        network_config: Its sizes.
        weights: Checkpoint to start from.
        weights_parts: Modules of it that are taken, into an otherwise fresh network; None is all.
        arm: What to become; None is what `weights` is.
        scheme_file: What to quantize how; None is as `weights` has it.
        batchnorm: What becomes of BatchNorm; None is as `weights` has it.
        ranges: What becomes of the ranges in training.
        engine_file: Deployment file that is run in the network's place.
        engine: What runs it; there is no network then.
    """

    network: CenterPoint
    network_config: NetworkConfig
    weights: str | None
    weights_parts: list[str] | None
    arm: Arm | None
    scheme_file: str | None
    batchnorm: BatchNormPolicy | None
    ranges: RangePolicy
    engine_file: str | None
    engine: Engine | None
    _subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The network as one of the arms, once it is built."""
        if self._subject is None:
            raise RuntimeError("the network is built by configure_model, or by loading a checkpoint")
        return self._subject

    @property
    def trained_on(self) -> Mapping[str, str]:
        """Fingerprint of a data set -> splits of it that were to be scored, and were trained on."""
        if self.engine is None:
            return self.subject.trained_on
        found: dict[str, str] = self.engine.sidecar.checkpoint.get("trained_on", {})
        return found

    @property
    def row(self) -> Row:
        """What it is in a comparison: its arm, or deployed."""
        return self.subject.arm if self.engine is None else DEPLOYED

    @override
    def configure_model(self) -> None:
        """Build the arm, once; a checkpoint that is resumed brings its own structure instead."""
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            self.refuse_engine()
        if self.engine_file is not None:
            self._start_engine(self.engine_file)
        elif self._subject is None and not self.is_resuming:
            self.start_as(self.arm)

    def _start_engine(self, file: str) -> None:
        """Let an engine take the network's place.

        Raises:
            UserError: It was made from other weights than `weights`, or has other sizes.
        """
        if self.engine is not None:
            return
        if self.is_resuming:
            raise UserError(f"model.engine_file {file!r} and a checkpoint to load: expected one of them")
        weights = self.weights
        network = None if weights is None else lambda: load(self.network_config, weights).network
        engine = Engine(Path(file), weights, network)
        engine.check_sizes(self.network_config)
        self._check_features()
        self.engine = engine

    def refuse_engine(self) -> None:
        """Refuse a deployment file where a network is needed.

        Raises:
            UserError: There is one.
        """
        if self.engine_file is not None:
            raise UserError(
                f"model.engine_file {self.engine_file!r} has no network to train, calibrate or measure; "
                "accepted with validate, test and predict (profile has an --engine_file of its own)"
            )

    def refuse_parts(self) -> None:
        """Refuse parts of weights where a whole network is needed.

        Raises:
            UserError: There are some.
        """
        if self.weights_parts is not None:
            raise UserError(
                f"model.weights_parts {self.weights_parts} begins a fit, and this is none: give the "
                "checkpoint that it wrote as model.weights, without model.weights_parts"
            )

    def start_as(self, arm: Arm | None) -> None:
        """Build an arm from `weights`.

        Args:
            arm: Which one; None is what `weights` is, or float without weights.

        Raises:
            UserError: The weights are unfit for it, or there are none to start it from.
        """
        self.refuse_engine()
        if self.weights_parts is not None:
            self._start_with_parts(self.weights_parts, arm)
        elif self.weights is not None:
            self._adopt(from_weights(self.network_config, self.weights, arm, self._scheme(), self.batchnorm))
        elif arm in (None, "float"):
            self.start_untrained()
        else:
            raise UserError(f"model.arm {arm!r} starts from a checkpoint: give model.weights")
        # Here and not when fitting starts: the optimizer and DDP are set up in between.
        if self.subject.arm == "qat":
            set_range_policy(self.subject, self.ranges.amax)

    def _start_with_parts(self, parts: list[str], arm: Arm | None) -> None:
        """Build a float arm that has parts of `weights`.

        Raises:
            UserError: See `start_with_parts`; there are no weights, or what starts is no fit of a float arm.
        """
        given, trainer = f"model.weights_parts {parts}", trainer_of(self)
        if trainer is not None and trainer.state.fn != "fit":
            self.refuse_parts()
        if self.weights is None:
            raise UserError(f"{given} without model.weights: expected the checkpoint that they are parts of")
        if arm not in (None, "float"):
            raise UserError(
                f"{given} with arm {arm!r}: accepted: float, for what is fresh has yet to be trained; {arm} "
                "starts from the checkpoint of that, as model.weights without model.weights_parts"
            )
        start = start_with_parts(self.network_config, self.weights, parts, self.batchnorm)
        self._adopt(start.subject)
        if self.is_global_zero:
            print_plain(start.summary(self.weights))

    def start_untrained(self) -> None:
        """Build the arm with fresh weights and without ranges, to train a float one or to be measured."""
        self._adopt(build(self.network_config, self.arm or "float", self._scheme(), self.batchnorm))

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]  # of a path: messages name it
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> Self:
        """The detector of a checkpoint of any arm; no other file is read.

        Args:
            checkpoint_path: The checkpoint.
            map_location: Device of the network; None is the CPU.
            hparams_file: Must be None: a checkpoint holds its settings.
            strict: Must not be False: every tensor is accounted for.
            weights_only: Any value: nothing but tensors and plain values is ever read.
            settings: Take the place of the checkpoint's; not arm, scheme and batchnorm, which it has.

        Raises:
            UserError: The checkpoint is unreadable or damaged, or an argument is none of these.
        """
        if hparams_file is not None or strict is False:
            raise UserError(
                f"hparams_file is {hparams_file!r}, strict is {strict}: accepted: null and true, for a "
                "checkpoint of this project describes itself"
            )
        if not isinstance(map_location, str | torch.device | None):
            raise UserError(f"map_location is {map_location!r}: accepted: a device")
        if decided := set(DECIDED_BY_FILE) & settings.keys():
            raise UserError(f"{', '.join(sorted(decided))}: what the checkpoint is, it says itself")
        checkpoint = read_checkpoint(checkpoint_path)
        own = settings_of(checkpoint, checkpoint_path, cls)
        detector = cls(**{**own, **settings})
        detector._adopt(from_content(detector.network_config, checkpoint, checkpoint_path))
        detector.load_state_dict(checkpoint["state_dict"])
        return detector if map_location is None else detector.to(map_location)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take on the structure that the checkpoint describes, before Lightning loads its tensors."""
        path = self.trainer.ckpt_path or "checkpoint"
        if self.trainer.state.fn == "fit":
            check_same_run(dict(self.hparams), checkpoint, path)
            check_optimizer_state(checkpoint, path)
        self._adopt(from_content(self.network_config, checkpoint, path))
        self.to(self.device)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say what it is, and with what data settings it was made."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, NuScenesDataModule) and self.trainer.state.fn == "fit":
            known, key = self.subject.trained_on, data.index.fingerprint
            if splits := union(known.get(key), data.selection.trained_and_scored):
                self.subject.trained_on = {**known, key: splits}
        checkpoint["quantization"] = self.subject.describe()
        if isinstance(data, NuScenesDataModule):
            checkpoint[DATA_KEY] = data.described()

    def _scheme(self) -> Scheme | None:
        """The scheme that is asked for; None where that of `weights` is meant, whose file may be gone."""
        made_with = None
        if self.scheme_file and self.weights and not Path(self.scheme_file).is_file():
            content = read_checkpoint(self.weights, mmap=True)
            if Description.of(content, self.weights).scheme is not None:
                made_with = hyper_parameters(content, self.weights).get("scheme")
        return scheme_of(self.scheme_file, made_with)

    @property
    def is_resuming(self) -> bool:
        """Whether the network comes from `--ckpt_path`."""
        trainer = trainer_of(self)
        return getattr(trainer, "restored_checkpoint", None) is not None

    def _check_features(self) -> None:
        """See that the data of the trainer, if there are any, have what the network takes."""
        data = getattr(trainer_of(self), "datamodule", None)
        if isinstance(data, NuScenesDataModule):
            check_features(self.network_config, data.evaluation_config.points)

    def _adopt(self, subject: Subject) -> None:
        self._check_features()
        self._subject = subject
        subject.network.dense_channels_last()
        self.network = subject.network
        self.freeze_batchnorm()

    @property
    def is_global_zero(self) -> bool:
        """Whether this process speaks for all ranks."""
        trainer = trainer_of(self)
        return trainer is None or trainer.is_global_zero

    @override
    def train(self, mode: bool = True) -> Self:
        """As of any module; a frozen BatchNorm stays in evaluation."""
        super().train(mode)
        self.freeze_batchnorm()
        return self

    def freeze_batchnorm(self) -> None:
        """Keep the BatchNorm of a network that has it frozen in evaluation."""
        if self._subject is not None and self._subject.batchnorm == "frozen":
            freeze_batchnorm(self.network)
