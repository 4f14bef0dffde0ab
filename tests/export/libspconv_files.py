"""Plans of small sparse parts that libspconv can hold, and their files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
from exported_networks import A8, CONV_INPUT, W8, new_subject
from numpy.typing import NDArray

from cpq_train.arms.subject import Subject
from cpq_train.export.libspconv.arithmetic import in_half_precision
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.plan import Convolution, Plan
from cpq_train.export.planning import plan_of
from cpq_train.quantization.scheme import Scheme

DENSE = {"layers": "*", "kinds": ["Conv2d", "ConvTranspose2d"], "weight": "off", "input": "off"}
SPARSE = {
    "layers": "*",
    "kinds": ["SubMConv3d", "SparseConv3d", "ResidualAdd"],
    "weight": "off",
    "input": "off",
}
FIRST_BLOCK = {"layers": "backbone_3d.conv1.0.*", "weight": "off", "input": "off"}


def _scheme(*rules: dict[str, Any], weight: Any = W8) -> dict[str, Any]:
    return {"defaults": {"weight": weight, "input": A8}, "rules": list(rules)}


SCHEMES = {
    "nvidia": _scheme(DENSE, CONV_INPUT, FIRST_BLOCK),
    "all but the first": _scheme(CONV_INPUT),
    "float": _scheme(SPARSE),
    "per tensor": _scheme(CONV_INPUT, weight={"bits": 8, "granularity": "per_tensor"}),
    "narrow weights": _scheme(CONV_INPUT, weight={**W8, "narrow_range": True}),
    "float at the end": _scheme(
        CONV_INPUT,
        {"layers": "backbone_3d.conv_out.*", "weight": "off", "input": "off"},
        {"layers": "backbone_3d.conv4.1.*", "weight": "off", "input": "off"},
    ),
}
"""Name -> a scheme whose sparse part can be written."""  # fmt: skip


def with_half_biases(plan: Plan) -> Plan:
    """Biases rounded to fp16, as `bias: fp16` has them."""
    return with_changed(
        plan, bias=lambda layer: None if layer.bias is None else layer.bias.astype(np.float16)
    )


def _half_bias(layer: Convolution) -> NDArray[np.float16] | None:
    return None if layer.bias is None else layer.bias.astype(np.float16)


def with_changed(plan: Plan, *names: str, **changes: Any) -> Plan:
    """A plan in which fields of convolutions are others.

    Args:
        plan: The plan.
        names: Of the layers; none means all convolutions.
        changes: Field -> its value, or what gives it from the layer.
    """
    operations = []
    for one in plan.operations:
        if one.name in names if names else isinstance(one, Convolution):
            fields = {name: value(one) if callable(value) else value for name, value in changes.items()}
            operations.append(replace(one, **fields))
        else:
            operations.append(one)
    return replace(plan, operations=tuple(operations))


@cache
def subject_of(scheme: str) -> Subject:
    """A calibrated network of a scheme of this module; shared, so leave it as it is."""
    return new_subject(Scheme.from_dict(SCHEMES[scheme]))


def writable(subject: Subject) -> Plan:
    """The sparse part of a network as it is written."""
    return in_half_precision(with_half_biases(plan_of(subject.network, "sparse")))


@cache
def sparse_plan(scheme: str) -> Plan:
    return writable(subject_of(scheme))


@cache
def content_of(scheme: str) -> bytes:
    content: bytes = model_of(sparse_plan(scheme), "0", "").SerializeToString()
    return content


def file_of(scheme: str) -> onnx.ModelProto:
    """A file that may be changed."""
    return onnx.ModelProto.FromString(content_of(scheme))


def said(node: onnx.NodeProto) -> dict[str, Any]:
    """Name -> value of a node's attributes."""
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def numbers(model: onnx.ModelProto) -> dict[str, NDArray[np.float16]]:
    """Name -> initializer, decoded from its bytes as the engine's parser does."""
    return {
        one.name: np.frombuffer(one.raw_data, np.float16).reshape(tuple(one.dims))
        for one in model.graph.initializer
    }
