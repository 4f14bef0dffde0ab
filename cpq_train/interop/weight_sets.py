"""Which weights a file holds: one set, or those as trained and their moving average (EMA) beside them.

Where the average lies is each writer's affair, and its name may mislead: the EMA hooks of mmcv, mmdetection
and mmengine, and Lightning's WeightAveraging, save the average where the weights usually are, so that
evaluation takes it, and keep those as trained beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.interop.conventions import Weights, unwrapped
from cpq_train.interop.foreign_file import STATE_KEYS, foreign_state

LIGHTNING_TRAINED = "current_model_state"
"""Where Lightning's WeightAveraging keeps the weights as trained."""

_AVERAGE_KEY = re.compile(r"(^|_)ema(_|$)")
_MMCV_PREFIX = "ema_"
_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")


@dataclass(frozen=True)
class WeightSet:
    """One of the sets.

    Attributes:
        name: `raw` or `ema` where the file holds both, None where it holds one set.
        state: Their name -> tensor.
        key: The file's entry that holds it; None where its tensors are the file's entries.
        place: Where in the file it lies, in words.
        left: Names in the same entry, which are of the other set.
    """

    name: Weights | None
    state: dict[str, Tensor]
    key: str | None
    place: str
    left: tuple[str, ...] = ()


def weight_sets(content: Any, path: str | Path) -> list[WeightSet]:
    """The sets of weights in a file's content; first the one that the writer's own evaluation takes.

    Args:
        content: As `read_foreign` gives it.
        path: For messages.

    Raises:
        UserError: It holds no weights, or several averages, or a second set that is not whole.
    """
    stored = foreign_state(content, path)
    key = next((key for key in STATE_KEYS if key in content), None)
    place = key or "the file itself"
    if mates := _mmcv_mates(stored):
        plain = {name: tensor for name, tensor in stored.items() if name not in mates.values()}
        named = f"{place}, names that begin with {_MMCV_PREFIX}"
        beside = _whole({name: stored[mate] for name, mate in mates.items()}, plain, named, path)
        return [
            WeightSet("ema", plain, key, f"{place}, the other names", tuple(mates.values())),
            WeightSet("raw", beside, key, named, tuple(mates)),
        ]
    second = _second_key(content, path)
    if second is None:
        return [WeightSet(None, stored, key, place)]
    # mmengine counts its steps among the tensors, and saves the average where the weights usually are.
    is_swapped = second == LIGHTNING_TRAINED or "steps" in content[second]
    names: tuple[Weights, Weights] = ("ema", "raw") if is_swapped else ("raw", "ema")
    return [
        WeightSet(names[0], stored, key, place),
        WeightSet(names[1], _whole(content[second], stored, second, path), second, second),
    ]


def chosen_weights(content: Any, path: str | Path, asked: Weights | None) -> WeightSet:
    """The set that is asked for, or the only one.

    Args:
        content: As `read_foreign` gives it.
        path: For messages.
        asked: Which one; None where nobody said.

    Raises:
        UserError: There are two and none is asked for, or an average is asked for and there is none; see
            `weight_sets`.
    """
    sets = weight_sets(content, path)
    places = {one.name: one.place for one in sets}
    if len(sets) == 2 and asked is None:
        raise UserError(
            f"checkpoint {str(path)!r} holds two sets of weights: as trained ({places['raw']}) and their "
            f"moving average ({places['ema']}): say with --weights raw or ema which to take "
            f"(its writer evaluates {sets[0].name})"
        )
    if len(sets) == 1 and asked == "ema":
        raise UserError(
            f"weights is 'ema', but checkpoint {str(path)!r} holds one set of weights ({sets[0].place}), and "
            "nothing in it says that they are averaged; accepted: raw, or none"
        )
    return next(one for one in sets if one.name in (asked, None))


def _mmcv_mates(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> that of the buffer in which the hooks of mmcv and mmdetection keep its other value."""
    by_name = {unwrapped(name): name for name in stored}
    buffers = {name: _MMCV_PREFIX + unwrapped(name).replace(".", "_") for name in stored}
    return {name: by_name[buffer] for name, buffer in buffers.items() if buffer in by_name}


def _second_key(content: Any, path: str | Path) -> str | None:
    """Where a second set of weights lies beside the first."""
    if not isinstance(content, Mapping):
        return None
    named = [key for key in content if key == LIGHTNING_TRAINED or _AVERAGE_KEY.search(str(key))]
    keys = [key for key in named if isinstance(content[key], Mapping) and _tensors(content[key])]
    if len(keys) > 1:
        raise UserError(f"checkpoint {str(path)!r} has {' and '.join(keys)}: expected one of them")
    return keys[0] if keys else None


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {unwrapped(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}


def _whole(
    beside: Mapping[str, Any], stored: Mapping[str, Tensor], place: str, path: str | Path
) -> dict[str, Tensor]:
    """A second set under the first one's names; it may lack the statistics of BatchNorm, which both share.

    Raises:
        UserError: It lacks others.
    """
    found = _tensors(beside)
    missing = [n for n in stored if unwrapped(n) not in found and not n.endswith((*_BUFFERS, "global_step"))]
    if missing:
        raise UserError(
            f"checkpoint {str(path)!r}: {place} lacks {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, so it is no whole set of weights"
        )
    return {name: found.get(unwrapped(name), tensor) for name, tensor in stored.items()}
