"""A deployment file in the network's place: the engine that runs it, called as the network is.

Letters: V voxels, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.export.names import DENSE_TARGETS, WHOLE_TARGETS
from cpq_train.export.packages import require
from cpq_train.export.parts import MAP
from cpq_train.export.plan import COORDS, FEATURES
from cpq_train.export.sidecar import Sidecar, read_sidecar
from cpq_train.models import CenterPoint, HeadOutput, NetworkConfig

PROVIDERS = ["CPUExecutionProvider"]

OF_TRAINING = ("backbone_bn_momentum",)
"""Settings of the network that its folded form no longer has."""

_ERRORS_ONLY = 3


Front: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""The sparse part of a network: from voxels to their map."""


class Engine(nn.Module):
    """A deployment file, run by onnxruntime on the CPU.

    Args:
        file: The file.
        checkpoint: What it has to come from; None asks for nothing.
        network: Gives the network of that checkpoint, whose sparse part runs in front of a file that is the
            dense part alone; not called for others.

    Attributes:
        file: The file.
        sidecar: What lies beside it.
        config: Sizes of the network.
        name: Of the runtime.
        version: Of the runtime.

    Raises:
        UserError: The file or its sidecar is missing, damaged or foreign, was exported from another
            checkpoint, is a part of a network that nothing here runs or that lacks its front, or onnxruntime
            is not installed.
    """

    name = "onnxruntime"

    def __init__(
        self,
        file: Path,
        checkpoint: str | Path | None = None,
        network: Callable[[], CenterPoint] | None = None,
    ) -> None:
        super().__init__()
        self.file, self.sidecar = file, read_sidecar(file)
        _check_source(file, self.sidecar, checkpoint)
        self._front = self._new_front(network)
        self.sidecar.check_heads(file)
        self.config = NetworkConfig(**self.sidecar.network)
        self.version: str = require("onnxruntime").__version__
        self._session = new_session(file.read_bytes(), str(file))
        self._check_ends()

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return str(self.sidecar.file["sha256"])

    def describe(self) -> dict[str, str]:
        """What a run says of what it was scored with."""
        return {
            "name": self.name,
            "version": self.version,
            "target": self.sidecar.target,
            "file": str(self.file),
            "sha256": self.sha256,
        }

    @override
    def forward(
        self, voxel_features_VC: Tensor, voxel_coords_V4: Tensor, batch_size: int
    ) -> list[HeadOutput]:
        """Raw outputs of each class group, computed sample by sample; see `CenterPoint.forward`."""
        found = [
            self.run_sample(self._session, voxel_features_VC[rows], voxel_coords_V4[rows])
            for rows in (voxel_coords_V4[:, 0] == sample for sample in range(batch_size))
        ]
        heads: list[HeadOutput] = [{} for _ in self.config.class_groups]
        for output in self.sidecar.outputs:
            maps = np.concatenate([outputs[output["name"]] for outputs in found])
            heads[output["head"]][output["branch"]] = torch.from_numpy(maps).to(voxel_features_VC.device)
        return heads

    @torch.no_grad()
    def run_sample(
        self,
        session: Any,
        features_VC: Tensor,
        coords_V4: Tensor,
        further: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> dict[str, NDArray[Any]]:
        """Name -> value of every output of a session for one sample.

        Args:
            session: Of `new_session`.
            features_VC: Features of the voxels.
            coords_V4: Their sample, which does not matter, and their cells z, y, x.
            further: Inputs of the session that the file does not have.
        """
        if self._front is None:
            feed = {FEATURES: _numpy(features_VC.float()), COORDS: _numpy(coords_V4[:, 1:].int())}
        else:
            of_one = torch.cat([torch.zeros_like(coords_V4[:, :1]), coords_V4[:, 1:]], 1)
            feed = {MAP: _numpy(self._front(features_VC, of_one, 1).float())}
        names: Sequence[str] = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {**feed, **further}), strict=True))

    def check_sizes(self, config: NetworkConfig) -> None:
        """Whether the file has the sizes that are asked for.

        Raises:
            UserError: It has others.
        """
        for field in fields(config):
            asked, own = getattr(config, field.name), getattr(self.config, field.name)
            if asked != own and field.name not in OF_TRAINING:
                raise UserError(
                    f"model.network.{field.name} is {asked}; engine file {str(self.file)!r} has {own}"
                )

    def _new_front(self, network: Callable[[], CenterPoint] | None) -> Front | None:
        """What runs in front of the file; nothing where it is a whole network."""
        target, where = self.sidecar.target, f"engine file {str(self.file)!r}"
        if target not in WHOLE_TARGETS + DENSE_TARGETS:
            raise UserError(
                f"{where} is of target {target!r}; accepted: {', '.join(WHOLE_TARGETS + DENSE_TARGETS)}"
            )
        if target in WHOLE_TARGETS:
            return None
        if network is None:
            raise UserError(
                f"{where} is of target {target!r}, a dense part alone: it runs behind the sparse part of its "
                "checkpoint, with validate, test and predict and --model.weights CHECKPOINT"
            )
        return _front_of(network().eval())

    def _check_ends(self) -> None:
        """Whether the file has the inputs and outputs that its sidecar names."""
        for stated, ends in (
            (self.sidecar.inputs, self._session.get_inputs()),
            (self.sidecar.outputs, self._session.get_outputs()),
        ):
            expected, found = [one["name"] for one in stated], [one.name for one in ends]
            if expected != found:
                raise UserError(
                    f"engine file {str(self.file)!r} has {', '.join(found)}; its sidecar says "
                    f"{', '.join(expected)}"
                )


def new_session(content: bytes, where: str) -> Any:
    """An onnxruntime session with as many threads as PyTorch has.

    Args:
        content: Bytes of the file.
        where: What to call it in messages.

    Raises:
        UserError: They are no ONNX file, or one that this onnxruntime cannot run.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(content, options, providers=PROVIDERS)
    except Exception as error:  # its own classes, which are none of Python's but Exception
        first = str(error).splitlines()[0]
        raise UserError(f"engine file {where!r}: onnxruntime cannot run it: {first}") from error


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()


def _check_source(file: Path, sidecar: Sidecar, checkpoint: str | Path | None) -> None:
    if checkpoint is None:
        return
    if not Path(checkpoint).is_file():
        raise UserError(f"checkpoint {str(checkpoint)!r} does not exist")
    source, found = sidecar.checkpoint, sha256_of(checkpoint)
    if source["sha256"] != found:
        raise UserError(
            f"engine file {str(file)!r} was exported from {source['path']!r} with SHA-256 "
            f"{source['sha256'][:12]}…, not from {str(checkpoint)!r} with {found[:12]}…"
        )


def _front_of(network: CenterPoint) -> Front:
    def front(features_VC: Tensor, coords_V4: Tensor, batch_size: int) -> Tensor:
        volume = network.backbone_3d(features_VC.cpu(), coords_V4.cpu(), batch_size)
        bev_BCHW: Tensor = network.map_to_bev_module(volume)
        return bev_BCHW

    return front
