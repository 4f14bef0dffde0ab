"""Another project's state dict as one of ours, every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_train.common.checkpoint import is_alike
from cpq_train.common.errors import UserError
from cpq_train.interop.conventions import Convention, sources_of, unwrapped
from cpq_train.interop.sparse_layouts import TO_KRSC, SparseLayout, choose_layout

AS_IT_IS, FILLED, DROPPED = (
    "taken as they are",
    "filled with zero, not in the file",
    "left out, of no use here",
)

_BIAS_BEFORE_NORM = re.compile(
    r"^(backbone_3d\.conv\d\.\d+\.conv[12]|dense_head\.shared_conv\.0|dense_head\.heads_list\.\d+\.\w+\.0\.0)\.bias$"
)
_UPSAMPLING = re.compile(r"^backbone_2d\.deblocks\.\d+\.0\.weight$")
_SIZE = re.compile(r"^dense_head\.heads_list\.\d+\.dim\.1\.(weight|bias)$")
_YAW = re.compile(r"^dense_head\.heads_list\.\d+\.rot\.1\.(weight|bias)$")

_HINTS = {
    "_amax": "it is quantized; convert float weights, and give this file to calibrate as --ranges_file",
    "pfn_layers": "these are pillars (PointPillars); this network has voxels",
    "feature_adapt|conv_offset": "deformable convolutions (DCN) have no counterpart here",
    r"\.conv1\.0\.0\.": "this is VoxelBackBone8x; ours has residual blocks, VoxelResBackBone8x",
}
"""What in unexpected names -> what that says."""


@dataclass(frozen=True)
class Converted:
    """A state dict in the conventions of ours.

    Attributes:
        state: Our name -> tensor, complete, in the order of ours.
        changes: What became of the numbers -> the names of the tensors; theirs for those dropped, else ours.
        named: Our name -> theirs, of those that the file has.
        layout: Axes of the sparse weights in the file.
    """

    state: dict[str, Tensor]
    changes: dict[str, list[str]]
    named: dict[str, str]
    layout: SparseLayout


def to_ours(
    theirs: Mapping[str, Tensor],
    convention: Convention,
    own: Mapping[str, Tensor],
    asked_layout: SparseLayout | None = None,
) -> Converted:
    """Rename, permute, reorder and complete the tensors of another project.

    Args:
        theirs: Their name -> tensor.
        convention: What the file looks like.
        own: The state dict of our network; gives names, shapes and dtypes.
        asked_layout: Axes of the sparse weights, where the shapes do not tell.

    Raises:
        UserError: The names are of another project or network, the layout is unclear, shapes differ, or there
            are values that are not finite.
    """
    _check_source(theirs, convention)
    named, dropped = _our_names(theirs, convention)
    missing = [name for name in own if name not in named]
    filled = [name for name in missing if _may_be_missing(name, convention)]
    _check_names(missing, filled, [name for ours, name in named.items() if ours not in own])
    tensors = {name: theirs[named[name]] for name in own if name in named}
    _check_kinds(tensors, own)
    sparse = {n: (tuple(t.shape), tuple(own[n].shape)) for n, t in tensors.items() if own[n].dim() == 5}
    layout = choose_layout(sparse, asked_layout)
    changes: dict[str, list[str]] = {}
    state = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    for name, tensor in tensors.items():
        change, state[name] = _in_our_convention(name, tensor, own[name], convention, layout)
        if tensor.dtype != own[name].dtype:
            change += f", {tensor.dtype} to {own[name].dtype}".replace("torch.", "")
        changes.setdefault(change, []).append(name)
    changes |= {what: names for what, names in ((FILLED, filled), (DROPPED, dropped)) if names}
    _check_values(state, own)
    state = {name: tensor.to(own[name].dtype).contiguous() for name, tensor in state.items()}
    return Converted(state, changes, named, layout)


def _check_source(theirs: Iterable[str], convention: Convention) -> None:
    source = convention.project.split()[0]
    found = sources_of(theirs)
    if found and source not in found:
        example = next(name for name in theirs if sources_of([name]))
        raise UserError(
            f"source is {source!r}, but the names are those of {' and '.join(sorted(found))} ({example}, ...)"
        )


def _our_names(theirs: Iterable[str], convention: Convention) -> tuple[dict[str, str], list[str]]:
    """Our name -> theirs, and those of theirs that the network has no use for."""
    named: dict[str, str] = {}
    dropped = []
    for name in theirs:
        ours = convention.our_name(name)
        if unwrapped(name) == "global_step":
            dropped.append(name)
        elif ours in named:
            raise UserError(f"{name} and {named[ours]} both stand for {ours}")
        else:
            named[ours] = name
    return named, dropped


def _may_be_missing(name: str, convention: Convention) -> bool:
    """A counter of batches, or a bias that is zero where there is none."""
    has_no_bias = not convention.has_bias_before_norm and _BIAS_BEFORE_NORM.match(name)
    return name.endswith(".num_batches_tracked") or bool(has_no_bias)


def _check_names(missing: list[str], filled: list[str], unexpected: list[str]) -> None:
    lost = [name for name in missing if name not in filled]
    if not (lost or unexpected):
        return
    parts = [f"missing here: {_some(lost)}"] if lost else []
    if unexpected:
        parts.append(f"not known here: {_some(unexpected)}")
    parts += [hint for what, hint in _HINTS.items() if any(re.search(what, name) for name in unexpected)]
    raise UserError("the file is of another network than `config` says; " + "; ".join(parts))


def _in_our_convention(
    name: str, tensor: Tensor, own: Tensor, convention: Convention, layout: SparseLayout
) -> tuple[str, Tensor]:
    """What was done to a tensor, and the result."""
    if own.dim() == 5 and layout != "krsc":
        return f"sparse weights: {layout} to krsc", tensor.permute(TO_KRSC[layout])
    is_upsampling = _UPSAMPLING.match(name) and own.shape[2:] == (1, 1) and tensor.dim() == 4
    if is_upsampling and convention.upsamples_by_conv:
        return "upsampling: Conv2d to ConvTranspose2d", tensor.transpose(0, 1)
    if _SIZE.match(name) and convention.size_rows != (0, 1, 2) and tensor.shape[:1] == (3,):
        return "size: width, length to length, width", tensor[list(convention.size_rows)]
    if _YAW.match(name) and convention.yaw_rows != (0, 1) and tensor.shape[:1] == (2,):
        return "yaw: sine, cosine to cosine, sine", tensor[list(convention.yaw_rows)]
    if _YAW.match(name) and convention.yaw_sign == -1:
        return "yaw: -yaw - pi/2 to yaw (negated)", -tensor
    return AS_IT_IS, tensor


def _check_kinds(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    kinds = [
        f"{name} is {tensor.dtype}, here {own[name].dtype}"
        for name, tensor in tensors.items()
        if not is_alike(tensor.dtype, own[name].dtype)
    ]
    if kinds:
        raise UserError(f"the file holds numbers of other kinds: {_some(kinds)}")


def _check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{name} is {tuple(tensor.shape)}, here {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[name].shape
    ]
    if shapes:
        raise UserError(f"the file is of another network than `config` says: {_some(shapes)}")
    unfit = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if unfit:
        raise UserError(f"values that are not finite: {_some(unfit)}")


def _some(entries: list[str]) -> str:
    first = ", ".join(entries[:3])
    return first if len(entries) <= 3 else f"{first}, ... ({len(entries)} in all)"
