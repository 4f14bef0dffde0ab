"""Reading other projects' checkpoints without running what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpq_train.common.checkpoint import is_dense, read_plain
from cpq_train.common.errors import UserError

STATE_KEYS = ("model_state", "state_dict")
"""Where OpenPCDet, and the others, keep the tensors of the network."""


class Placeholder:
    """Stands for an object that is beside the weights: takes any arguments and any state, and keeps none."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


PLACEHOLDERS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # mmengine: methods of HistoryBuffer
    "builtins.bytes",  # the data of an empty array
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
"""What is read as a `Placeholder`: training logs of mmengine, numbers of NumPy in counters and optimizers."""


def read_foreign(path: str | Path) -> Any:
    """Load another project's checkpoint on the CPU; nothing that it names is called or constructed.

    Torch's unpickler for weights admits tensors and plain values. Names in `PLACEHOLDERS` give a placeholder;
    every other name is refused.

    Raises:
        UserError: The file is missing, corrupt, or names another class or function.
    """
    with torch.serialization.safe_globals([(Placeholder, name) for name in PLACEHOLDERS]):
        return read_plain(path)


def foreign_state(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors of the network in a file's content, under the file's own names.

    Args:
        content: A bare state dict, or one under one of `STATE_KEYS`.
        path: For messages.

    Raises:
        UserError: There are none, or two places have some, or something among them is no plain tensor.
    """
    keys = [key for key in STATE_KEYS if isinstance(content, Mapping) and key in content]
    if len(keys) > 1:
        raise UserError(f"checkpoint {str(path)!r} has {' and '.join(keys)}: expected one of them")
    state = content[keys[0]] if keys else content
    if not isinstance(state, Mapping) or not state:
        raise UserError(
            f"checkpoint {str(path)!r} holds {_kind(state)}; expected a dictionary of tensors, bare or under "
            + " or ".join(STATE_KEYS)
        )
    for name, value in state.items():
        if not (isinstance(name, str) and is_dense(value)):
            raise UserError(
                f"checkpoint {str(path)!r} is no state dict: {name!r} is {_kind(value)}; expected tensors"
            )
    return dict(state)


def stated_mmdet3d_version(content: Any) -> int | None:
    """The major version of mmdetection3d that a file says it was written by; None where it does not say.

    Files of mmengine, which came with 1.1, state mmengine's version only.
    """
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    version = "1" if "mmengine_version" in meta else str(meta.get("mmdet3d_version"))
    major = version.split(".")[0]
    return int(major) if major.isdecimal() else None


def _kind(value: Any) -> str:
    if isinstance(value, Mapping) and not value:
        return "an empty dictionary"
    if isinstance(value, Placeholder):
        return "an object of NumPy or mmengine"
    return f"a {type(value).__name__}"
