"""Reading and writing checkpoints safely: tensors and plain values only, on a machine without CUDA."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError
from torch import Tensor

from cpq_train.common.archive import check_archive, is_archive, pickles
from cpq_train.common.bounds import check_bounds
from cpq_train.common.errors import ForeignCheckpointError, UserError
from cpq_train.common.files import check_regular, write_whole
from cpq_train.common.pickles import check_pickle
from cpq_train.common.schema import Count, accepts, keys, validated

NETWORK_PREFIX = "network."
"""The detector keeps its network under this name."""

NOT_TRAINED = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning")}
"""What every reader expects of a checkpoint, where one was not written by Lightning but by `convert`."""

NUM_PICKLES = 5
"""Of torch's older format: a number, its version, the system, the content, the names of its tensors."""

UNCHECKED = "has no checksums: whether it is damaged cannot be told"

NUM_KEYS_SHOWN = 8


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor of numbers in memory, as weights are."""
    is_strided = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return is_strided and value.device.type == "cpu"


def is_alike(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether numbers of one type can take the place of another's: both real, or both whole."""
    kinds = [(kind.is_floating_point, kind.is_complex, kind == torch.bool) for kind in (one, other)]
    return kinds[0] == kinds[1]


def _dense(value: Any) -> Tensor:
    if not is_dense(value):
        raise PydanticCustomError("dense", "dense")
    tensor: Tensor = value
    return tensor


_Weights = Annotated[Any, PlainValidator(_dense), accepts("a dense tensor")]
_OURS: TypeAdapter[dict[str, Any]] = TypeAdapter(
    keys(
        {
            "state_dict": dict[str, _Weights],
            "quantization": dict[str, Any],
            "epoch": Count,
            "global_step": Count,
        }
    )
)


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU, with `weights_only=True`.

    Args:
        path: The file.
        mmap: Leave the tensors on the disk until they are used: for what a checkpoint says.

    Returns:
        Lightning's dictionary, with at least `state_dict`, `quantization` and what `NOT_TRAINED` has.

    Raises:
        UserError: The file is missing or corrupt.
        ForeignCheckpointError: It holds pickled code, or is no checkpoint of this project.
    """
    return checked(read_plain(path, mmap), path)


def checked(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, if it is one of this project; see `read_checkpoint`."""
    if not isinstance(checkpoint, dict) or not {"state_dict", "quantization"} <= set(checkpoint):
        raise ForeignCheckpointError(
            f"checkpoint {str(path)!r} is none of this project's: it holds {_content(checkpoint)}; "
            "expected state_dict and quantization",
            Path(path),
        )
    completed = {**NOT_TRAINED, **checkpoint}
    validated(_OURS, completed, f"checkpoint {str(path)!r}")
    return completed


def _content(checkpoint: Any) -> str:
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__}"
    names = [str(name)[:60] for name in checkpoint]
    more = f" and {len(names) - NUM_KEYS_SHOWN} more keys" if len(names) > NUM_KEYS_SHOWN else ""
    return (", ".join(names[:NUM_KEYS_SHOWN]) or "nothing") + more


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint; the file appears, or replaces the old one, only when it is whole.

    It is put together in memory first: how much room it takes is known before the disk is touched.

    Raises:
        UserError: The disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, serialized(checkpoint))


def serialized(content: Any, as_archive: bool = True) -> memoryview:
    """The bytes that `torch.save` writes, of the zip archive or of torch's older format."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=as_archive)
    return buffer.getbuffer()


def read_plain(path: str | Path, mmap: bool = False) -> Any:
    """Load any file of `torch.save` on the CPU, with `weights_only=True`, and compare its checksums.

    Args:
        path: The file; local, never a URL.
        mmap: Leave the tensors on the disk until they are used, and unchecked, where the format has it (a zip
            archive): for what a checkpoint says.

    Raises:
        UserError: The file is missing, corrupt, or stands for more than it holds.
        ForeignCheckpointError: It holds pickled code.
    """
    path = Path(path)
    check_regular(path, "checkpoint")
    try:
        is_checked = check_archive(path, leave_tensors=mmap)
        _check_pickles(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive(path))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if _is_refusal(str(error), path):
            raise ForeignCheckpointError(
                f"checkpoint {str(path)!r} holds pickled code and is refused{_named(str(error))}; "
                "accepted: tensors and plain values",
                path,
            ) from error
        raise UserError(f"checkpoint {str(path)!r} is corrupt: no file that torch can read") from error
    except Exception as error:  # of garbage, torch's unpickler may raise anything
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {str(path)!r} is corrupt: {first}") from error
    check_bounds(content, path.stat().st_size, f"checkpoint {str(path)!r}")
    if not (is_checked or mmap):
        warnings.warn(f"checkpoint {str(path)!r} {UNCHECKED}", stacklevel=2)
    return content


def _check_pickles(path: Path) -> None:
    """Follow what is pickled, before torch makes it. In torch's older format five pickles come first."""
    for file in pickles(path):
        num_left = 1 if is_archive(path) else NUM_PICKLES
        while num_left and file.peek(1):
            check_pickle(file, f"checkpoint {str(path)!r}")
            num_left -= 1


def _is_refusal(message: str, path: Path) -> bool:
    """Whether torch met a call or class it does not admit, rather than bytes that make no sense.

    It names what it does not admit as GLOBAL, and says "Unsupported operand" of a pickle of a newer protocol
    and of garbage; a pickle starts with 0x80, an archive with PK.
    """
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80" or is_archive(path)
    return "GLOBAL" in message or ("Unsupported operand" in message and is_pickle)


def _named(message: str) -> str:
    """The class or function that torch refused, in brackets, where its message says it."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f" ({found[1]})" if found else ""


def network_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's part of the state dict, under the network's own names."""
    state = checkpoint["state_dict"]
    return {k.removeprefix(NETWORK_PREFIX): v for k, v in state.items() if k.startswith(NETWORK_PREFIX)}
