"""A file of libspconv with one other number, field or edge does not pass for its plan."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from libspconv_files import content_of, file_of, sparse_plan
from onnx import helper, numpy_helper

from cpq_train.common.errors import UserError
from cpq_train.export.libspconv.reader import read_plan
from cpq_train.export.plan import differences

Change = Callable[[onnx.ModelProto], None]

FIRST, FLOAT, INTEGER = "backbone_3d.conv_input.0", "backbone_3d.conv1.0.conv2", "backbone_3d.conv2.0.0"
ADD = "backbone_3d.conv2.1.quant_add"


def _finding(model: onnx.ModelProto, folder: Path) -> str:
    """What is said of a changed file; it has to be said, by the reader or by a comparison with the plan."""
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        found = differences(sparse_plan("nvidia"), read_plan(path))
    except UserError as error:
        found = [str(error).removeprefix(f"{path}: ")]
    (finding,) = found
    assert "\n" not in finding
    return finding


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _attribute(model: onnx.ModelProto, node: str, name: str) -> onnx.AttributeProto:
    return next(one for one in _node(model, node).attribute if one.name == name)


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


# Numbers


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("layer", [FIRST, FLOAT, INTEGER, "backbone_3d.conv_out.0"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_one_other_number_is_found(layer: str, kind: str, place: int, tmp_path: Path) -> None:
    model = file_of("nvidia")
    one = _initializer(model, f"{layer}.{kind}")
    values = numpy_helper.to_array(one).copy()
    values.flat[place] = np.nextafter(values.flat[place], np.float16(np.inf))
    one.CopyFrom(numpy_helper.from_array(values, one.name))
    finding = _finding(model, tmp_path)
    if kind == "weight" and layer in (INTEGER, "backbone_3d.conv_out.0"):
        assert finding == f"initializer '{layer}.weight' is not what the writer makes of the rest"
    else:
        assert finding in (
            f"{layer}: its {kind} differs",
            f"node '{layer}' is not what the writer makes of the rest",  # the largest weight of its channel
        )


def test_another_code_is_found(tmp_path: Path) -> None:
    model, layer = file_of("nvidia"), sparse_plan("nvidia")[INTEGER]
    one = _initializer(model, f"{INTEGER}.weight")
    values = numpy_helper.to_array(one).copy()
    code = layer.weight.flat[0] - 1 if layer.weight.flat[0] > 0 else layer.weight.flat[0] + 1
    values.flat[0] = np.float32(code) * layer.weight_step[0]
    one.CopyFrom(numpy_helper.from_array(values, one.name))
    assert _finding(model, tmp_path) == f"{INTEGER}: its weight differs"


@pytest.mark.parametrize("change", [lambda v: v.astype(np.float32), lambda v: v[..., None], lambda v: v[:-1]])
@pytest.mark.parametrize("name", [f"{FIRST}.weight", f"{INTEGER}.weight", f"{INTEGER}.bias", f"{FLOAT}.bias"])
def test_other_types_and_shapes_are_found(
    name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    model = file_of("nvidia")
    one = _initializer(model, name)
    one.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(one)), name))
    assert _finding(model, tmp_path)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["input_dynamic_range", "weight_dynamic_ranges"])
def test_ranges_that_are_none_are_found(name: str, value: float, tmp_path: Path) -> None:
    model = file_of("nvidia")
    one = _attribute(model, INTEGER, name)
    if one.floats:
        one.floats[2] = value
    else:
        one.f = value
    assert INTEGER in _finding(model, tmp_path)


# Fields


def _fields() -> list[tuple[str, str]]:
    found = {
        (node.op_type, one.name): None for node in file_of("nvidia").graph.node for one in node.attribute
    }
    return list(found)


def _change(one: onnx.AttributeProto) -> None:
    match one.type:
        case onnx.AttributeProto.INTS:
            one.ints[-1] += 1
        case onnx.AttributeProto.INT:
            one.i += 1
        case onnx.AttributeProto.STRING:
            one.s = {b"ReLU": b"None", b"None": b"ReLU", b"int8": b"fp16", b"fp16": b"int8"}.get(
                one.s, b"xyz"
            )
        case onnx.AttributeProto.FLOAT:
            one.f = float(np.nextafter(np.float32(one.f), np.float32(np.inf)))
        case onnx.AttributeProto.FLOATS:
            one.floats[-1] *= 2
        case _:
            raise AssertionError(one.name)


def test_every_field_that_is_written_is_changed_below() -> None:
    assert len(_fields()) == 23 + 4 + 3 + 1


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(("operator", "name"), _fields())
def test_one_other_field_is_found(operator: str, name: str, place: str, tmp_path: Path) -> None:
    model = file_of("nvidia")
    having = [
        one
        for node in model.graph.node
        if node.op_type == operator
        for one in node.attribute
        if one.name == name
    ]
    _change(having[{"first": 0, "middle": len(having) // 2, "last": -1}[place]])
    assert "'" in (finding := _finding(model, tmp_path)) or " differs" in finding or "grid is" in finding


@pytest.mark.parametrize(("operator", "name"), _fields())
def test_a_field_less_is_found(operator: str, name: str, tmp_path: Path) -> None:
    model = file_of("nvidia")
    node = next(
        n for n in model.graph.node if n.op_type == operator and any(a.name == name for a in n.attribute)
    )
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    finding = _finding(model, tmp_path)
    assert f"'{node.name}'" in finding
    assert "is not made as export does it" in finding or f"has no attribute '{name}'" in finding


@pytest.mark.parametrize(("operator", "name"), _fields())
def test_a_field_of_another_type_is_found(operator: str, name: str, tmp_path: Path) -> None:
    model = file_of("nvidia")
    node = next(
        n for n in model.graph.node if n.op_type == operator and any(a.name == name for a in n.attribute)
    )
    (place,) = [number for number, one in enumerate(node.attribute) if one.name == name]
    node.attribute[place].CopyFrom(helper.make_attribute(name, ["a", "b"]))
    assert _finding(model, tmp_path) == f"node '{node.name}': has an attribute '{name}' of type STRINGS"


@pytest.mark.parametrize(
    ("operator", "field"),
    [
        ("SparseConvolution", {"fixed_launch_points": 10}),
        ("ScatterDense", {"output_layout": "NCHW32"}),
        ("Relu", {"alpha": 0.1}),
    ],
)
def test_a_field_more_is_found(operator: str, field: dict[str, Any], tmp_path: Path) -> None:
    model = file_of("nvidia")
    node = next(node for node in model.graph.node if node.op_type == operator)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in field.items())
    (name,) = field
    assert f"node '{node.name}': has an attribute '{name}' of type " in _finding(model, tmp_path)


def test_a_range_of_a_layer_in_fp16_is_found(tmp_path: Path) -> None:
    model = file_of("nvidia")
    _node(model, FIRST).attribute.append(helper.make_attribute("input_dynamic_range", 1.0))
    assert f"node '{FIRST}' is not what the writer makes" in _finding(model, tmp_path)


# Nodes and edges


def _places() -> list[tuple[str, int]]:
    nodes = file_of("nvidia").graph.node
    return list({(node.op_type, place): None for node in nodes for place in range(len(node.input))})


@pytest.mark.parametrize(("operator", "place"), _places())
def test_an_edge_to_another_tensor_is_found(operator: str, place: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [n.name for n in file_of("nvidia").graph.node if n.op_type == operator]
    for name in {names[0], names[len(names) // 2], names[-1]}:
        model = file_of("nvidia")
        before = ["voxel_features", *(one.name for one in model.graph.initializer)]
        for node in model.graph.node:
            if node.name == name:
                break
            before.append(node.output[0])
        node.input[place] = rng.choice([one for one in before if one != node.input[place]])
        assert _finding(model, tmp_path)


def _without_a_relu(model: onnx.ModelProto) -> None:
    node = _node(model, f"{ADD}.relu")
    add = _node(model, ADD)
    add.output[0] = node.output[0]
    model.graph.node.remove(node)


def _with_a_relu_behind_a_convolution(model: onnx.ModelProto) -> None:
    node, place = _node(model, FLOAT), [n.name for n in model.graph.node].index(FLOAT)
    name, node.output[0] = node.output[0], f"{FLOAT}.sum"
    model.graph.node.insert(place + 1, helper.make_node("Relu", [f"{FLOAT}.sum"], [name], f"{FLOAT}.relu"))


def _with_an_unknown_operator(model: onnx.ModelProto) -> None:
    _node(model, ADD).op_type = "QuantAdd"


def _with_an_input_less(model: onnx.ModelProto) -> None:
    del _node(model, INTEGER).input[2]


def _with_a_node_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", [ADD], ["more"], "more"))


def _with_a_relu_first(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["voxel_features"], ["more"], "more"))


def _with_a_number_more(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float16), "more"))


def _with_an_input_more(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT16, [1]))


def _without_dimensions(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[:]


def _of_fp32_voxels(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _of_other_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 12


def _with_names_like_nvidias(model: onnx.ModelProto) -> None:
    for number, node in enumerate(n for n in model.graph.node if n.op_type == "SparseConvolution"):
        node.name = f"conv{number}"


def _with_the_bias_for_the_weight(model: onnx.ModelProto) -> None:
    node = _node(model, INTEGER)
    node.input[1], node.input[2] = node.input[2], node.input[1]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_without_a_relu, f"{ADD}: its relu differs"),
        (_with_a_relu_behind_a_convolution, f"node '{FLOAT}.relu' is not made as export does it"),
        (_with_an_unknown_operator, f"node '{ADD}': QuantAdd is no operator of libspconv; accepted: Sparse"),
        (_with_an_input_less, f"node '{INTEGER}': has 2 inputs; expected 3"),
        (_with_a_node_more, "node 'more' is not made as export does it"),
        (_with_a_relu_first, "node 'more' is not made as export does it"),
        (_with_a_number_more, "initializer 'more' is not what the writer makes"),
        (_with_an_input_more, "no sparse layer, or not one input"),
        (_without_dimensions, f"node '{FIRST}' is not what the writer makes"),
        (_of_fp32_voxels, "input 'voxel_features' is not what the writer makes"),
        (_of_other_operators, "another version of the operators"),
        (_with_names_like_nvidias, "its numbers make no network ("),
        (_with_the_bias_for_the_weight, "has the name of a bias; expected that of a weight"),
    ],
)
def test_other_changes_are_found(change: Change, finding: str, tmp_path: Path) -> None:
    model = file_of("nvidia")
    change(model)
    assert finding in _finding(model, tmp_path)


# Other files


def _of_something_else() -> bytes:
    one = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [one], [two])
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


def _with_short_data() -> bytes:
    model = file_of("nvidia")
    one = _initializer(model, f"{INTEGER}.weight")
    one.raw_data = one.raw_data[:-2]
    content: bytes = model.SerializeToString()
    return content


def _in_a_circle() -> bytes:
    model = file_of("nvidia")
    node = _node(model, INTEGER)
    node.input[0] = node.output[0]
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"a text\nof two lines", "no ONNX file ("),
        (lambda: b"", "no ONNX file ("),
        (lambda: content_of("nvidia")[:5000], "no ONNX file ("),
        (_with_short_data, "no ONNX file ("),
        (_in_a_circle, "no ONNX file ("),
        (_of_something_else, "node '' is not made as export does it"),
    ],
)
def test_another_file_is_named(content: Callable[[], bytes], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content())
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {reason}')}") as error:
        read_plan(path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no.onnx'}: no ONNX file")):
        read_plan(tmp_path / "no.onnx")
