"""The JSON file beside a deployment file: where it comes from, what goes in and out, and what to do with it.

It holds what an engine's host needs and the network does not compute: how points become voxels, how heads
become boxes, what the classes are called. Its hash of the deployment file ties the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import NotRequired

from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of, write_whole
from cpq_train.common.schema import Count, check_document, keys, list_of, validated
from cpq_train.export.names import sidecar_path
from cpq_train.models import NetworkConfig
from cpq_train.models.decode import PostProcessing

SCHEMA = 1

_KIND = TypeAdapter(
    keys(
        {
            "target": str,
            "file": keys({"name": str, "sha256": str, "num_bytes": Count}),
            "checkpoint": keys(
                {
                    **dict.fromkeys(("path", "sha256", "arm"), str),
                    "parents": dict[str, Any],
                    "trained_on": NotRequired[dict[str, str]],
                }
            ),
            "inputs": list_of(keys({"name": str})),
            "outputs": list_of(keys({"name": str})),
            "class_names": list[Any],
            "head_map": keys(dict.fromkeys(("stride", "width", "height"), Count)),
            **dict.fromkeys(("scheme", "coverage", "versions"), dict[str, Any]),
            **dict.fromkeys(("network", "data", "post_processing"), dict[str, Any]),
        }
    )
)
_HEADS = TypeAdapter(keys({"outputs": list_of(keys({"head": Count, "branch": str}))}))

_SETTINGS = {"network": NetworkConfig, "post_processing": PostProcessing}
"""Mappings that a class is made of, which checks them."""


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a deployment file.

    Attributes:
        target: One of `targets.TARGETS`.
        file: "name", "sha256", "num_bytes" of the deployment file.
        checkpoint: "path", "sha256", "arm", "parents", "trained_on" of what was exported.
        scheme: How it is quantized, whole.
        coverage: Kind of layer -> [quantized, all].
        versions: Package -> version, and "opset".
        inputs: "name", "dtype", "shape" (letters are free) and "meaning" of each.
        outputs: The same; maps of the head also with "head" (index into the class groups) and "branch".
        class_names: Names by class id.
        head_map: "stride" in voxels, "width" and "height" in cells, of the map that the outputs lie on.
        network: Settings of `NetworkConfig`.
        data: Settings of `DataSettings`.
        post_processing: Settings of `PostProcessing`, thresholds of scores among them.
    """

    target: str
    file: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    scheme: Mapping[str, Any]
    coverage: Mapping[str, Any]
    versions: Mapping[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    class_names: list[str]
    head_map: Mapping[str, int]
    network: Mapping[str, Any]
    data: Mapping[str, Any]
    post_processing: Mapping[str, Any]

    def check_heads(self, engine_file: Path) -> None:
        """Whether every output is a map of the head, for whoever puts them together.

        Raises:
            UserError: One is not.
        """
        validated(_HEADS, {"outputs": self.outputs}, str(sidecar_path(engine_file)))

    @property
    def parents(self) -> dict[str, str]:
        """Arm -> SHA-256 of the checkpoints that the file came from, the exported one included."""
        source = self.checkpoint
        # One with snapped biases names the checkpoint of its arm that it was made of: that is the run's.
        return {source["arm"]: source["sha256"], **source["parents"]}

    def write(self, path: Path) -> None:
        """Write the file."""
        write_whole(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n")


def read_sidecar(engine_file: Path) -> Sidecar:
    """The sidecar of a deployment file, which is the very file that it was written with.

    Raises:
        UserError: One of the two is missing or damaged, or they do not belong together.
    """
    path = sidecar_path(engine_file)
    if not engine_file.is_file():
        raise UserError(f"engine file {str(engine_file)!r} does not exist")
    if not path.is_file():
        raise UserError(
            f"engine file {str(engine_file)!r} has no {path.name} beside it: export writes both, keep them "
            "together"
        )
    document = read_json(path, "sidecar")
    check_document(document, SCHEMA, _KIND, str(path))
    for name, settings in _SETTINGS.items():
        try:
            settings(**document[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {name}: {error}") from error
    found, expected = sha256_of(engine_file), document["file"]["sha256"]
    if found != expected:
        raise UserError(
            f"engine file {str(engine_file)!r} is not the one that {path.name} was written with: its SHA-256 "
            f"is {found[:12]}…, expected {expected[:12]}… (damaged, or exchanged)"
        )
    return Sidecar(**{field.name: document[field.name] for field in fields(Sidecar)})
