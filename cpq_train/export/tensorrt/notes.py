"""What the fp32 numbers of a TensorRT file leave open, as a note in the file's metadata.

Several amax have one step, a range may be narrow where nothing is negative, and a bias is fp32 there however
the plan holds it. The reader takes these from the note; the numbers have to agree with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from cpq_train.common.schema import Flag, keys, mapping_to
from cpq_train.export.plan import Convolution, Float32, InputRange, Plan
from cpq_train.quantization.numerics.formats import IntegerFormat

KEY = "cpq_train"
"""Of the note in the metadata."""

BIAS_TYPES = ("float32", "float16", "int32")

_Amax = Annotated[float, Field(strict=True, gt=0, le=float(np.finfo(np.float32).max))]
_Bits = Annotated[int, Field(strict=True, ge=2, le=16)]
_KIND = TypeAdapter[Any](
    keys(
        {
            "ranges": mapping_to(keys({"amax": _Amax, "bits": _Bits, "signed": Flag, "narrow_range": Flag})),
            "biases": mapping_to(Annotated[str, Field(pattern=f"^({'|'.join(BIAS_TYPES)})$")]),
        }
    )
)


class Notes(NamedTuple):
    """What a note says.

    Attributes:
        ranges: Name of codes -> how they are made.
        biases: Name of a layer -> the type of its bias in the plan.
    """

    ranges: Mapping[str, InputRange]
    biases: Mapping[str, str]


def note_of(plan: Plan) -> str:
    """The note of a plan, JSON."""
    ranges = {
        name: {"amax": chosen.amax, **asdict(chosen.format)}
        for (_, chosen), name in plan.code_tensors().items()
    }
    layers = [one for one in plan.operations if isinstance(one, Convolution)]
    biases = {layer.name: layer.bias.dtype.name for layer in layers if layer.bias is not None}
    return json.dumps({"ranges": ranges, "biases": biases})


def read_note(text: str) -> Notes:
    """What a note says.

    Raises:
        ValueError: It is no note.
    """
    found = _KIND.validate_json(text)
    ranges = {
        name: InputRange(float(np.float32(one.pop("amax"))), IntegerFormat(**one))
        for name, one in found["ranges"].items()
    }
    return Notes(ranges, found["biases"])


def step_of(chosen: InputRange) -> np.float32:
    """The value of code 1."""
    return np.float32(chosen.amax) / np.float32(chosen.largest)


def bias_values(layer: Convolution) -> Float32:
    """The bias of a layer in fp32, (C',)."""
    assert layer.bias is not None
    values = layer.bias.astype(np.float32)
    return values * _unit(layer) if layer.bias.dtype == np.int32 else values


def bias_of(values: Float32, dtype: str, layer: Convolution) -> NDArray[Any]:
    """The bias that has these values in fp32.

    Args:
        values: (C',).
        dtype: Of the bias.
        layer: Its steps are those of the bias.
    """
    if dtype != "int32":
        return values.astype(dtype)
    codes: NDArray[np.int32] = np.rint(values.astype(np.float64) / _unit(layer)).astype(np.int32)
    return codes


def _unit(layer: Convolution) -> Float32:
    """The value of 1 in the sum of products of codes, (C',)."""
    assert layer.input_range is not None
    assert layer.weight_step is not None
    return step_of(layer.input_range) * layer.weight_step
