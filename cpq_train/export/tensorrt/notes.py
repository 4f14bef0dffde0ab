"""What the fp32 numbers of a TensorRT file leave open, as a note in the file's metadata.

Several amax have one step, several codes of a bias one value, and a range may be narrow where nothing is
negative. The reader takes these from the note, and the numbers of the file have to be those that follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter

from cpq_train.common.schema import Flag, keys, list_of, mapping_to
from cpq_train.export.plan import Convolution, Float32, InputRange, Plan
from cpq_train.quantization.numerics.biases import LARGEST_BIAS_CODE
from cpq_train.quantization.numerics.formats import IntegerFormat

KEY = "cpq_train"
"""Of the note in the metadata."""

_Amax = Annotated[float, Field(strict=True, gt=0, le=float(np.finfo(np.float32).max))]
_Bits = Annotated[int, Field(strict=True, ge=2, le=16)]
_Code = Annotated[int, Field(strict=True, ge=-LARGEST_BIAS_CODE, le=LARGEST_BIAS_CODE)]
_KIND = TypeAdapter[Any](
    keys(
        {
            "ranges": mapping_to(keys({"amax": _Amax, "bits": _Bits, "signed": Flag, "narrow_range": Flag})),
            "biases": mapping_to(Literal["float32", "float16"] | list_of(_Code)),
        }
    )
)


class Notes(NamedTuple):
    """What a note says.

    Attributes:
        ranges: Name of codes -> how they are made.
        biases: Name of a layer -> the type of its bias in the plan, or its codes where it is whole numbers.
    """

    ranges: Mapping[str, InputRange]
    biases: Mapping[str, str | list[int]]


def note_of(plan: Plan) -> str:
    """The note of a plan, JSON."""
    ranges = {
        name: {"amax": chosen.amax, **asdict(chosen.format)}
        for (_, chosen), name in plan.code_tensors().items()
    }
    biases = {
        layer.name: layer.bias.tolist() if layer.bias.dtype == np.int32 else layer.bias.dtype.name
        for layer in plan.operations
        if isinstance(layer, Convolution) and layer.bias is not None
    }
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


def bias_values(layer: Convolution) -> Float32:
    """The bias of a layer in fp32, (C',)."""
    assert layer.bias is not None
    values = layer.bias.astype(np.float32)
    if layer.bias.dtype != np.int32:
        return values
    assert layer.input_range is not None
    assert layer.weight_step is not None
    return values * (layer.input_range.step * layer.weight_step)
