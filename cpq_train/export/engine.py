"""A deployment file in the network's place: the engine that runs it, called as the network is.

Letters: V voxels, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from cpq_train.common.checkpoint import sha256_of
from cpq_train.common.errors import UserError
from cpq_train.export.packages import require
from cpq_train.export.sidecar import read_sidecar
from cpq_train.models import HeadOutput, NetworkConfig

TARGETS = ("portable",)
"""Those whose files an engine here runs whole."""

PROVIDERS = ["CPUExecutionProvider"]

OF_TRAINING = ("backbone_bn_momentum",)
"""Settings of the network that its folded form no longer has."""

_ERRORS_ONLY = 3


class Engine(nn.Module):
    """A deployment file, run by onnxruntime on the CPU.

    Args:
        file: The file.

    Attributes:
        file: The file.
        sidecar: What lies beside it.
        config: Sizes of the network.
        name: Of the runtime.
        version: Of the runtime.

    Raises:
        UserError: The file or its sidecar is missing, damaged or foreign, or onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.sidecar = file, read_sidecar(file)
        if self.sidecar.target not in TARGETS:
            raise UserError(
                f"engine file {str(file)!r} is of target {self.sidecar.target!r}; "
                f"accepted: {', '.join(TARGETS)}"
            )
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
        samples = [voxel_coords_V4[:, 0] == sample for sample in range(batch_size)]
        found = [
            run_sample(self._session, voxel_features_VC[rows], voxel_coords_V4[rows, 1:]) for rows in samples
        ]
        heads: list[HeadOutput] = [{} for _ in self.config.class_groups]
        for output in self.sidecar.outputs:
            maps = np.concatenate([outputs[output["name"]] for outputs in found])
            heads[output["head"]][output["branch"]] = torch.from_numpy(maps).to(voxel_features_VC.device)
        return heads

    def check_source(self, checkpoint: str | Path | None) -> None:
        """Whether the file was exported from a checkpoint; None asks for nothing.

        Raises:
            UserError: It was exported from another one, or there is none.
        """
        if checkpoint is None:
            return
        if not Path(checkpoint).is_file():
            raise UserError(f"checkpoint {str(checkpoint)!r} does not exist")
        source, found = self.sidecar.checkpoint, sha256_of(checkpoint)
        if source["sha256"] != found:
            raise UserError(
                f"engine file {str(self.file)!r} was exported from {source['path']!r} with SHA-256 "
                f"{source['sha256'][:12]}…, not from {str(checkpoint)!r} with {found[:12]}…"
            )

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


def run_sample(session: Any, features_VC: Tensor, coords_V3: Tensor) -> dict[str, NDArray[Any]]:
    """Name -> value of every output of a session for one sample.

    Args:
        session: Of `new_session`.
        features_VC: Features of the voxels.
        coords_V3: Their cells z, y, x.
    """
    feed = {
        "voxel_features": features_VC.detach().float().cpu().contiguous().numpy(),
        "voxel_coords": coords_V3.int().cpu().contiguous().numpy(),
    }
    names: Sequence[str] = [output.name for output in session.get_outputs()]
    outputs: Mapping[str, NDArray[Any]] = dict(zip(names, session.run(None, feed), strict=True))
    return dict(outputs)
