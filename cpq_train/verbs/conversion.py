"""What `convert` does: a checkpoint read, renamed, written, read back and run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.table import Table
from torch import Tensor

from cpq_train.arms.description import Description
from cpq_train.arms.loading import from_content, load
from cpq_train.arms.structure import build
from cpq_train.arms.subject import Subject
from cpq_train.common.checkpoint import NETWORK_PREFIX, NOT_TRAINED, read_checkpoint, serialized
from cpq_train.common.console import print_plain
from cpq_train.common.documents import read_yaml
from cpq_train.common.errors import UserError
from cpq_train.common.files import replacing, sha256_of, write_whole
from cpq_train.interop.conventions import (
    MMDET3D_0,
    MMDET3D_1,
    OPENPCDET,
    TIANWEIY,
    Convention,
    Source,
    Weights,
)
from cpq_train.interop.conversion import DROPPED, FILLED, Converted, to_ours
from cpq_train.interop.foreign_file import read_foreign, stated_mmdet3d_version
from cpq_train.interop.openpcdet_file import openpcdet_content
from cpq_train.interop.sparse_layouts import SparseLayout
from cpq_train.interop.weight_sets import WeightSet, chosen_weights
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.center_head import branches_of
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.settings import HYPER_PARAMETERS, plain, settings_of

CHECK_NUM_VOXELS: Final = 2000
NUM_NAMES_SHOWN: Final = 4


def convert_foreign(
    input: Path,
    output: Path,
    source: Source,
    mmdet3d_version: Literal[0, 1] | None,
    sparse_layout: SparseLayout | None,
    weights: Weights | None,
    config: Path | None,
) -> None:
    """Turn another project's checkpoint into one of ours; see `convert`, which has checked the arguments.

    Raises:
        UserError: The file is unreadable, holds code, or is of another project or network.
    """
    subject = build(_network_config(config), "float", None)
    content = read_foreign(input)
    convention = _convention(source, mmdet3d_version, content)
    taken = _weights(input, content, weights)
    converted = _converted(input, taken, convention, subject.network, sparse_layout)
    subject.parents = {source: sha256_of(input)}
    output.parent.mkdir(parents=True, exist_ok=True)
    data = serialized(_checkpoint(subject, taken, converted, convention, source))
    with replacing(output, len(data)) as part:
        part.write_bytes(data)
        num_voxels = _run(load(subject.network.config, part).network)
    _report(input, content, taken, converted)
    print_plain(
        f"forward pass of {output} on {num_voxels} random voxels: "
        f"{len(subject.network.config.class_groups)} heads, every output finite and of the right shape"
    )


def write_openpcdet(input: Path, output: Path) -> None:
    """Write a float checkpoint of ours in OpenPCDet's layout; see `convert`.

    Raises:
        UserError: It is unreadable, quantized, or of another network.
    """
    checkpoint = read_checkpoint(input)
    Description.of(checkpoint, input).check_centerpoint(input)
    content = openpcdet_content(checkpoint, input)
    settings = settings_of(checkpoint, input, CenterPointDetector)
    from_content(settings.get("network", NetworkConfig()), checkpoint, input)  # every tensor is looked at
    output.parent.mkdir(parents=True, exist_ok=True)
    # OpenPCDet writes files that are no zip archives; torch before 1.6 reads only those.
    write_whole(output, serialized(content, as_archive=False))
    print_plain(f"{output}: OpenPCDet, {len(content['model_state'])} tensors")


def _network_config(path: Path | None) -> NetworkConfig:
    if path is None:
        return NetworkConfig()
    content = read_yaml(path, "config")
    try:
        return NetworkConfig(**((content.get("model") or {}).get("network") or {}))
    except (AttributeError, TypeError) as error:
        raise UserError(f"config {str(path)!r} has no readable model.network: {error}") from error


def _convention(source: Source, mmdet3d_version: int | None, content: Any) -> Convention:
    if source != "mmdet3d":
        return {"openpcdet": OPENPCDET, "tianweiy": TIANWEIY}[source]
    stated = stated_mmdet3d_version(content)
    if stated is not None and stated != mmdet3d_version:
        raise UserError(f"mmdet3d_version is {mmdet3d_version}, but the file says that {stated}.x wrote it")
    return (MMDET3D_0, MMDET3D_1)[mmdet3d_version or 0]


def _weights(path: Path, content: Any, asked: Weights | None) -> WeightSet:
    if isinstance(content, Mapping) and "quantization" in content:
        raise UserError(f"checkpoint {str(path)!r} is of this project: it can be model.weights as it is")
    return chosen_weights(content, path, asked)


def _converted(
    path: Path,
    taken: WeightSet,
    convention: Convention,
    network: CenterPoint,
    sparse_layout: SparseLayout | None,
) -> Converted:
    try:
        return to_ours(taken.state, convention, network.state_dict(), sparse_layout)
    except UserError as error:
        raise UserError(f"checkpoint {str(path)!r}: {error}") from error


def _checkpoint(
    subject: Subject, taken: WeightSet, converted: Converted, convention: Convention, source: Source
) -> dict[str, Any]:
    return {
        **NOT_TRAINED,
        "state_dict": {NETWORK_PREFIX + name: tensor for name, tensor in converted.state.items()},
        HYPER_PARAMETERS: plain({"network": subject.network.config}),
        "quantization": subject.describe(),
        "conversion": {
            "source": convention.project,
            "sparse_layout": converted.layout,
            "weights": taken.name,
            "input_sha256": subject.parents[source],
        },
    }


@torch.inference_mode()
def _run(network: CenterPoint) -> int:
    """A forward pass on a seeded cloud; the number of its voxels.

    Raises:
        UserError: An output is not finite or of another shape than the head's.
    """
    geometry = network.geometry
    features, coords = _random_voxels(network.config)
    heads = network.eval()(features, coords, 1)
    for group, head in zip(network.config.class_groups, heads, strict=True):
        for branch, channels in branches_of(len(group)).items():
            shape = tuple(head[branch].shape)
            is_finite = bool(head[branch].isfinite().all())
            if shape != (1, channels, geometry.height, geometry.width) or not is_finite:
                raise UserError(
                    f"the converted network gives {branch} of {', '.join(group)} as {shape}, "
                    f"{'' if is_finite else 'not '}all finite"
                )
    return len(coords)


def _random_voxels(config: NetworkConfig) -> tuple[Tensor, Tensor]:
    """Features (V, C) and coordinates (V, 4) of voxels in the middle of the grid, close to one another."""
    generator = torch.Generator().manual_seed(0)
    grid_zyx = torch.tensor(config.grid_size[::-1])
    offsets = torch.randn(CHECK_NUM_VOXELS, 3, generator=generator) * torch.tensor([4.0, 12.0, 12.0])
    cells = (grid_zyx // 2 + offsets.long()).clamp(torch.zeros_like(grid_zyx), grid_zyx - 1).unique(dim=0)
    size, low = torch.tensor(config.voxel_size), torch.tensor(config.point_cloud_range[:3])
    features = torch.rand(len(cells), max(3, config.num_point_features), generator=generator)
    features[:, :3] = low + (cells.flip(1) + 0.5) * size
    coords = torch.cat([torch.zeros(len(cells), 1, dtype=torch.long), cells], 1)
    return features[:, : config.num_point_features], coords.int()


def _report(path: Path, content: Any, taken: WeightSet, converted: Converted) -> None:
    which = f"{taken.name} weights ({taken.place})" if taken.name else f"weights of {taken.place}"
    said = f"{path}: {which}; sparse weights were {converted.layout}"
    print_plain(said, _table(taken, converted), _sums(taken, converted, content))


def _table(taken: WeightSet, converted: Converted) -> Table:
    table = Table()
    table.add_column("tensors", justify="right")
    table.add_column("renamed", justify="right")
    table.add_column("their numbers")
    table.add_column("which", overflow="fold")
    rows = {**converted.changes, **({"left out, of the other set": list(taken.left)} if taken.left else {})}
    for change, names in rows.items():
        num_renamed = sum(converted.named.get(name, name) != name for name in names)
        table.add_row(str(len(names)), str(num_renamed or ""), change, _which(names))
    return table


def _which(names: list[str]) -> str:
    """The names, all heads' as one; where they are many, how many there are of each kind or in each part."""
    distinct = list(dict.fromkeys(re.sub(r"(heads_list)\.\d+", r"\1.*", name) for name in names))
    if len(distinct) <= NUM_NAMES_SHOWN:
        return ", ".join(distinct)
    by_kind = Counter(re.sub(r"\..*\.", ".*.", name) for name in names)
    by_part = Counter(name.split(".")[0] for name in names)
    groups = by_kind if len(by_kind) <= NUM_NAMES_SHOWN else by_part
    return ", ".join(f"{count} of {group}" for group, count in groups.items())


def _sums(taken: WeightSet, converted: Converted, content: Any) -> str:
    """How the numbers of tensors in the file and in the network come about, and what else the file holds."""
    num_filled, num_dropped = (len(converted.changes.get(what, ())) for what in (FILLED, DROPPED))
    num_left = num_dropped + len(taken.left)
    num_taken = len(converted.state) - num_filled
    rest = [] if taken.key is None else [str(key) for key in content if key != taken.key]
    return (
        f"in the file {num_taken + num_left} tensors: {num_taken} taken, {num_left} left out; "
        f"in the network {len(converted.state)}: {num_taken} taken, {num_filled} filled with zero; "
        f"beside them in the file, left out: {', '.join(rest) or 'nothing'}"
    )
