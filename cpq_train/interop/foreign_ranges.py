"""Ranges from other projects' checkpoints: NVIDIA's CenterPoint, and others made with pytorch-quantization.

Their quantizers save `..._input_quantizer._amax` and `..._weight_quantizer._amax`, as ours do. Names of
layers are OpenPCDet's, as ours are, or those of tianweiy/CenterPoint (det3d), which NVIDIA uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.interop.conventions import OPENPCDET, TIANWEIY, Convention, convention_of
from cpq_train.interop.foreign_file import STATE_KEYS, read_foreign

AMAX = "_quantizer._amax"
WEIGHT_AMAX = "_weight_quantizer._amax"

LARGEST_FACTOR = 2.0
"""Between a weight and its amax; beyond it the file was made for other weights, or before folding."""

_SIZE_WEIGHT = re.compile(rf"^dense_head\.heads_list\.\d+\.dim\.1\.{re.escape(WEIGHT_AMAX)}$")


@dataclass(frozen=True)
class MatchedRanges:
    """What a file says of a network.

    Attributes:
        values: Our name -> amax in our shape; a shared quantizer is there under all its names.
        unused: Their name -> why it was not taken.
        missing: Our quantizers that the file says nothing of; shared ones under their first name.
        warnings: What looks as if the file were made for other weights.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self) -> str:
        """How many ranges were taken, and every name that did not match."""
        blocks = {
            "names in the file not used": [f"{name}: {why}" for name, why in self.unused.items()],
            "quantizers that the file leaves without": self.missing,
            "warnings": self.warnings,
        }
        lines = [f"ranges from the file: {len(self.values)}"]
        for title, entries in blocks.items():
            lines += [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def read_ranges(path: str | Path) -> dict[str, Tensor]:
    """Every amax in a file, under the file's own names.

    Args:
        path: A bare state dict, or one under `state_dict` or `model_state`.

    Raises:
        UserError: The file is missing, corrupt, holds pickled code, or no amax.
    """
    content = read_foreign(path)
    state: Any = content if isinstance(content, Mapping) else {}
    state = next((state[key] for key in STATE_KEYS if key in state), state)
    found = {
        name: value for name, value in state.items() if str(name).endswith(AMAX) and isinstance(value, Tensor)
    }
    if not found:
        raise UserError(
            f"ranges {str(path)!r} hold no amax; accepted: a state dict with names ending in {AMAX}"
        )
    return found


def match_ranges(theirs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> MatchedRanges:
    """Find our quantizer for each of their amax.

    Args:
        theirs: Their name -> amax.
        state: The state dict of our network, quantizers and folded weights.
    """
    matched = MatchedRanges()
    found: dict[str, list[Tensor]] = {}
    for name, amax in theirs.items():
        convention = TIANWEIY if convention_of(name) is TIANWEIY else OPENPCDET
        ours = convention.our_name(name)
        taken = _fit(_in_our_order(ours, amax.float(), convention), ours, state)
        if isinstance(taken, str):
            matched.unused[name] = taken
        else:
            found.setdefault(ours, []).append(taken)
    for members in _quantizers(state):
        values = [value for member in members for value in found.get(member, [])]
        if not values:
            matched.missing.append(members[0])
            continue
        largest = torch.stack(values).amax(0)
        matched.values.update(dict.fromkeys(members, largest))
        matched.warnings.extend(_doubts(members[0], values, largest, state))
    return matched


def _in_our_order(name: str, amax: Tensor, convention: Convention) -> Tensor:
    """The ranges of the channels that are a box's length, width, height, in this order."""
    is_size = _SIZE_WEIGHT.match(name) and amax.numel() == 3
    return amax.flatten()[list(convention.size_rows)].view(amax.shape) if is_size else amax


def _quantizers(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each quantizer of ours; those that share one have the same memory."""
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        if name.endswith(AMAX):
            groups.setdefault(value.data_ptr(), []).append(name)
    return list(groups.values())


def _fit(amax: Tensor, name: str, state: Mapping[str, Tensor]) -> Tensor | str:
    """Their amax in the shape of ours, or why it does not fit."""
    own = state.get(name)
    if own is None:
        return "no static quantizer of this name here"
    if amax.shape == own.shape or (amax.numel() == 1 and own.numel() == 1):
        return amax.reshape(own.shape)
    if amax.numel() != own.numel():
        return f"{amax.numel()} values, here {own.numel()}"
    weight = state[name.replace(WEIGHT_AMAX, "weight")]
    if list(weight.shape).count(own.numel()) > 1:
        return f"shape {tuple(amax.shape)}, here {tuple(own.shape)}: it does not say which axis is meant"
    return amax.reshape(own.shape)


def _doubts(name: str, values: list[Tensor], amax: Tensor, state: Mapping[str, Tensor]) -> list[str]:
    doubts = []
    smallest = torch.stack(values).amin(0)
    if not torch.equal(smallest, amax):
        doubts.append(f"{name} stands for {len(values)} that differ: the largest is taken")
    if name.endswith(WEIGHT_AMAX):
        weight = state[name.replace(WEIGHT_AMAX, "weight")].float().abs()
        own = weight.amax([d for d in range(weight.dim()) if amax.dim() == 0 or amax.shape[d] == 1], True)
        ratio = torch.maximum(amax / own.view(amax.shape), own.view(amax.shape) / amax)
        num_off = int((ratio > LARGEST_FACTOR).sum())
        if num_off:
            doubts.append(
                f"{name}: amax and weight differ by more than a factor {LARGEST_FACTOR:g} "
                f"in {num_off} of {amax.numel()} channels: other weights, or BatchNorm not folded alike"
            )
    return doubts
