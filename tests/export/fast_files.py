"""Networks whose biases are whole, and their portable-fast files."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
from exported_networks import CONV_INPUT, SCHEMES, new_subject

from cpq_train.arms.snapped_biases import snap_biases
from cpq_train.arms.subject import Subject
from cpq_train.export.plan import Convolution, Plan
from cpq_train.export.planning import plan_of
from cpq_train.export.portable.fast import as_said, fast_graph
from cpq_train.quantization.scheme import Scheme

UNSIGNED_BYTES = {"bits": 8, "signed": False}


def _scheme(layers: str, input: Any, bits: int = 8) -> dict[str, Any]:
    defaults = {"weight": {"bits": bits}, "input": {"bits": bits}, "bias": "accumulator"}
    return {"defaults": defaults, "rules": [{"layers": layers, "input": input}, CONV_INPUT]}


BRANCH = "dense_head.heads_list.0.hm.0.0"
SAME_SIZE, UPSAMPLING = "backbone_2d.deblocks.0.0", "backbone_2d.deblocks.1.0"
"""The parts of the map that the head reads: by 1 x 1 and by 2 x 2."""

SHARED = "dense_head.shared_conv.0"

FAST_SCHEMES: dict[str, str | dict[str, Any]] = {
    **SCHEMES,
    "a part in unsigned bytes": _scheme(SAME_SIZE, UNSIGNED_BYTES),
    "codes up to 255": _scheme("backbone_2d.blocks.1.7", UNSIGNED_BYTES),
    "a map in unsigned bytes": _scheme(SHARED, UNSIGNED_BYTES),
    "a map in 16 bits": _scheme(SHARED, {"bits": 16}),
    "a branch in 4 bits": _scheme(BRANCH, {"bits": 4}),
    "two bits": _scheme("dense_head.*", {"bits": 2}, bits=2),
}
"""Name -> a scheme file or its content."""


def whole_biases(chosen: str | dict[str, Any], **of_network: Any) -> Subject:
    """A calibrated network of a scheme with accumulator biases wherever there is an integer sum."""
    scheme = Scheme.from_file(chosen) if isinstance(chosen, str) else Scheme.from_dict(chosen)
    subject = new_subject(scheme, **of_network)
    snap_biases(subject, {"*": "accumulator"})
    return subject


@cache
def fast_subject(name: str) -> Subject:
    """The network of a scheme; shared, so leave it as it is."""
    return whole_biases(FAST_SCHEMES[name])


@cache
def fast_plan(name: str) -> Plan:
    return as_said(plan_of(fast_subject(name).network))


def fast_model(plan: Plan) -> onnx.ModelProto:
    model: onnx.ModelProto = fast_graph(plan).model("centerpoint", "0", "")
    return model


@cache
def fast_content(name: str) -> bytes:
    content: bytes = fast_model(fast_plan(name)).SerializeToString()
    return content


def dense_layers(plan: Plan) -> list[Convolution]:
    return [one for one in plan.operations if isinstance(one, Convolution) and not one.is_sparse]
