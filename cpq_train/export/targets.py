"""What `export` can write, by name: which part of a network, what is refused, how it is written and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.common.errors import UserError
from cpq_train.export.libspconv import arithmetic, refusals
from cpq_train.export.libspconv import reader as libspconv_reader
from cpq_train.export.libspconv import writer as libspconv_writer
from cpq_train.export.plan import Convolution, Plan
from cpq_train.export.planning import SPARSE_PREFIX, Part
from cpq_train.export.portable import fast, fast_reader, reader
from cpq_train.export.portable.writer import portable_graph
from cpq_train.export.tensorrt import reader as tensorrt_reader
from cpq_train.export.tensorrt import writer as tensorrt_writer
from cpq_train.export.tensorrt.trtexec import trtexec_line
from cpq_train.quantization.numerics.biases import BiasKind


def _nothing(plan: Plan) -> dict[str, str]:
    return {}


def _as_it_is(plan: Plan) -> Plan:
    return plan


def _no_remarks(plan: Plan, file: Path) -> list[str]:
    return []


@dataclass(frozen=True)
class Target:
    """A kind of deployment file.

    Args:
        part: How much of a network it holds.
        is_exact: Whether its engine's numbers are those of the network, bit for bit.
        snapped: Glob over names of layers -> the kind of bias that `export --snap_biases` gives them; later
            ones win. Those of the libspconv target serve a tensorrt file of the same checkpoint too.
        model_of: The content of a file, from a plan, a version of this package and a text.
        read_plan: A file's plan, which raises a UserError where it is not one that `model_of` makes.
        why_not: Name -> reason of the layers of a plan that it cannot say.
        as_said: A plan with its numbers in the types that the file has; what is written, and read again.
        remarks: What to say of a plan and its file, a line each.
    """

    part: Part
    is_exact: bool
    snapped: Mapping[str, BiasKind]
    model_of: Callable[[Plan, str, str], Any]
    read_plan: Callable[[Path], Plan]
    why_not: Callable[[Plan], dict[str, str]] = _nothing
    as_said: Callable[[Plan], Plan] = _as_it_is
    remarks: Callable[[Plan, Path], list[str]] = _no_remarks


def _portable(plan: Plan, version: str, documentation: str) -> Any:
    return portable_graph(plan).model("centerpoint", version, documentation)


def _fast(plan: Plan, version: str, documentation: str) -> Any:
    return fast.fast_graph(plan).model("centerpoint", version, documentation)


def _remarks_of_fast(plan: Plan, file: Path) -> list[str]:
    dense = [o for o in plan.operations if isinstance(o, Convolution) and not o.is_sparse]
    return [
        f"{len(fast.fused_layers(plan))} of {len(dense)} dense layers go from codes to codes in one kernel"
    ]


def _remarks_of_tensorrt(plan: Plan, file: Path) -> list[str]:
    lines = [f"TensorRT's form, not run in TensorRT; it builds with: {trtexec_line(file)}"]
    layers = [o for o in plan.operations if isinstance(o, Convolution) and o.input_range is not None]
    num_off = sum(layer.bias is not None and layer.bias.dtype != np.int32 for layer in layers)
    if num_off:
        lines.append(
            f"biases of {num_off} of {len(layers)} layers are no whole multiples of their step: TensorRT's "
            "kernels round them, and some codes become others; bias: accumulator, or --snap_biases"
        )
    return lines


def _remarks_of_libspconv(plan: Plan, file: Path) -> list[str]:
    layers = [o for o in plan.operations if isinstance(o, Convolution)]
    in_half = [layer.name for layer in layers if layer.input_range is None]
    lines = ["libspconv's form, not run in libspconv"]
    if in_half:
        lines.append(f"weights and biases of float layers are rounded to fp16: {', '.join(in_half)}")
    return [*lines, *refusals.remarks(plan)]


TARGETS = {
    "portable": Target("whole", True, {"*": "accumulator"}, _portable, reader.read_plan),
    "portable-fast": Target(
        "whole",
        False,
        {"*": "accumulator"},
        _fast,
        fast_reader.read_plan,
        why_not=fast.why_not,
        as_said=fast.as_said,
        remarks=_remarks_of_fast,
    ),
    "tensorrt": Target(
        "dense",
        False,
        {"backbone_2d.*": "accumulator", "dense_head.*": "accumulator"},
        tensorrt_writer.model_of,
        tensorrt_reader.read_plan,
        why_not=tensorrt_writer.why_not,
        remarks=_remarks_of_tensorrt,
    ),
    "libspconv": Target(
        "sparse",
        False,
        {"*": "accumulator", f"{SPARSE_PREFIX}*": "fp16"},
        libspconv_writer.model_of,
        libspconv_reader.read_plan,
        why_not=refusals.why_not,
        as_said=arithmetic.in_half_precision,
        remarks=_remarks_of_libspconv,
    ),
}
"""Name -> what it is."""


def target_of(name: str, where: str) -> Target:
    """The target of a name that a file states.

    Args:
        name: Of the target.
        where: What states it, for messages.

    Raises:
        UserError: There is none.
    """
    if name not in TARGETS:
        raise UserError(f"{where} is of target {name!r}; accepted: {', '.join(TARGETS)}")
    return TARGETS[name]
