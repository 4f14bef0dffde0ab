"""A portable-fast file says what its plan says; with one other number, attribute or edge it is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported_networks import content_of
from fast_files import FAST_SCHEMES, SAME_SIZE, SHARED, UPSAMPLING, fast_content, fast_plan
from onnx import helper, numpy_helper

from cpq_train.common.errors import UserError
from cpq_train.export.plan import differences
from cpq_train.export.portable import fast_reader, reader
from cpq_train.export.targets import TARGETS
from cpq_train.export.writing import check_written

CHANGED = "a part in unsigned bytes"
"""The scheme of the files that are changed: kernels, one of them transposed, exact layers, a map of both."""

UP, JOINED = UPSAMPLING, "backbone_2d.concatenation"
FIRST = "backbone_2d.blocks.0.1"
BRANCH = "dense_head.heads_list.1.vel"

Change = Callable[[onnx.ModelProto], object]


def _model() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(fast_content(CHANGED))


def _finding(model: onnx.ModelProto, folder: Path) -> str:
    """What is said of a changed file; it has to be said."""
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError) as error:
        check_written(path, fast_plan(CHANGED), TARGETS["portable-fast"])
    return str(error.value).removeprefix(f"{path}: ")


def _node(model: onnx.ModelProto, tensor: str) -> Any:
    return next(node for node in model.graph.node if node.output[0] == tensor)


@pytest.mark.parametrize("scheme", FAST_SCHEMES)
def test_a_file_read_again_is_its_plan(scheme: str, tmp_path: Path) -> None:
    path, plan = tmp_path / "net.onnx", fast_plan(scheme)
    path.write_bytes(fast_content(scheme))
    found = fast_reader.read_plan(path)
    assert differences(plan, found) == []
    assert list(found.outputs) == list(plan.outputs)
    check_written(path, plan, TARGETS["portable-fast"])


# Files of the other portable target


@pytest.mark.parametrize("scheme", ["int8", "w4a8", "mixed", CHANGED, "a branch in 4 bits"])
def test_the_exact_reader_refuses_kernels(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(fast_content(scheme))
    with pytest.raises(UserError, match=r"net\.onnx: tensor '\S+'.* makes it"):
        reader.read_plan(tmp_path / "net.onnx")


@pytest.mark.parametrize("scheme", ["int8", "w4a8", "accumulator w4"])
def test_the_fast_reader_refuses_what_should_be_kernels(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content_of(scheme))
    with pytest.raises(UserError, match=r"net\.onnx: node '\S+' is not what the writer makes of the rest"):
        fast_reader.read_plan(tmp_path / "net.onnx")


@pytest.mark.parametrize("scheme", ["whole", "sixteen"])
def test_a_portable_file_of_float_biases_is_another(scheme: str, tmp_path: Path) -> None:
    """A reader finds kernels' layers with biases that no kernel has, or layers that are no kernels."""
    path = tmp_path / "net.onnx"
    path.write_bytes(content_of(scheme))
    with pytest.raises(UserError):
        check_written(path, fast_plan(scheme), TARGETS["portable-fast"])


def test_the_file_of_another_network_is_not_the_plan(tmp_path: Path) -> None:
    finding = _finding(onnx.ModelProto.FromString(fast_content("w4a8")), tmp_path)
    assert finding.startswith("what was written is not the plan:\n  ")
    assert finding.count(" differs") > 20


# Numbers


def _others(values: np.ndarray) -> Iterator[np.ndarray]:
    """One number another one; another type; another shape."""
    for place in {0, values.size - 1}:
        flat = values.copy().reshape(-1)
        is_float = flat.dtype == np.float32
        flat[place] = np.nextafter(flat[place], np.float32(np.inf)) if is_float else flat[place] ^ 1
        yield flat.reshape(values.shape)
    yield values.astype(np.float64)
    yield values[..., None]
    if values.size > 1:
        yield values.reshape(-1)[:-1]


def _change_number(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    one = next(one for one in model.graph.initializer if one.name == name)
    one.CopyFrom(numpy_helper.from_array(values, name))


def _values(name: str) -> np.ndarray:
    return numpy_helper.to_array(next(one for one in _model().graph.initializer if one.name == name))


NUMBERS = [
    *(
        f"{layer}.{end}"
        for layer in (FIRST, UP, SHARED)
        for end in ("weight_codes", "weight_step", "bias_codes")
    ),
    *(f"{layer}.codes.amax" for layer in ("backbone_3d.conv_out.0", UP, SAME_SIZE, JOINED, SHARED)),
    *("uint8:0", "int8:0", "uint8:127", "number:127", "number:255"),
    *("ints:18,2,2,1", "ints:9,2,2,2", "ints:1,9,4,2"),
]


@pytest.mark.parametrize("name", NUMBERS)
def test_one_other_number_is_found(name: str, tmp_path: Path) -> None:
    for values in _others(_values(name)):
        model = _model()
        _change_number(model, name, values)
        assert "'" in (finding := _finding(model, tmp_path)) or " differs" in finding


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (f"{FIRST}.weight_codes", "weight"),
        (f"{UP}.weight_codes", "weight"),
        (f"{SHARED}.weight_step", "weight_step"),
        (f"{SHARED}.bias_codes", "bias"),
        (f"{BRANCH}.1.bias_codes", "bias"),
    ],
)
def test_another_number_is_said_with_its_layer(name: str, field: str, tmp_path: Path) -> None:
    model = _model()
    _change_number(model, name, next(_others(_values(name))))
    layer = name.rpartition(".")[0]
    assert _finding(model, tmp_path) == f"what was written is not the plan:\n  {layer}: its {field} differs"


@pytest.mark.parametrize("end", ["weight_step", "bias_codes"])
def test_numbers_of_the_copies_of_a_channel_are_equal(end: str, tmp_path: Path) -> None:
    """An upsampling by 2 x 2 is a convolution of four times the channels."""
    name, model = f"{UP}.{end}", _model()
    values = _values(name).copy()
    repeats = 4
    assert len(values) == repeats * 9
    assert values[0] == values[1] == values[3] != values[4]
    values[1] = values[4]
    _change_number(model, name, values)
    assert _finding(model, tmp_path) == f"initializer {name!r} is not what the writer makes of the rest"


# Attributes and edges


def _change_attribute(attribute: onnx.AttributeProto) -> None:
    match attribute.type:
        case onnx.AttributeProto.INTS:
            attribute.ints[-1] += 1
        case onnx.AttributeProto.INT:
            attribute.i += 1
        case _:
            raise AssertionError(attribute.name)


CONVOLUTIONS = ("QLinearConv", "ConvTranspose")


def test_one_other_attribute_is_found(tmp_path: Path) -> None:
    seen = set()
    for place, node in enumerate(_model().graph.node):
        for number, attribute in enumerate(node.attribute):
            is_dense = "backbone_3d" not in node.output[0] and "voxels" not in node.output[0]
            is_new = (node.op_type, attribute.name) not in seen or place % 5 == 0  # of many alike, some
            if is_dense and is_new and node.op_type in (*CONVOLUTIONS, "Transpose", "Concat", "Cast"):
                seen.add((node.op_type, attribute.name))
                model = _model()
                _change_attribute(model.graph.node[place].attribute[number])
                assert _finding(model, tmp_path), (node.output[0], attribute.name)
    assert seen == {
        *product(CONVOLUTIONS, ("kernel_shape", "strides", "pads", "dilations")),
        *(("Transpose", "perm"), ("Concat", "axis"), ("Cast", "to")),
    }


@pytest.mark.parametrize("attribute", [{"group": 2}, {"auto_pad": "SAME_UPPER"}])
def test_an_attribute_more_is_found(attribute: dict[str, Any], tmp_path: Path) -> None:
    model = _model()
    node = _node(model, FIRST)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attribute.items())
    assert f"node '{FIRST}' is not what the writer makes" in _finding(model, tmp_path)


ENDS = (FIRST, UP, SHARED, f"{BRANCH}.0.0", JOINED, SAME_SIZE)
"""What the tensors are called whose edges are changed: kernels, a transposed one, a map of bytes."""


def test_an_edge_to_another_tensor_is_found(tmp_path: Path) -> None:
    rng, nodes, operators = np.random.default_rng(0), _model().graph.node, set()
    for place, node in enumerate(nodes):
        if not node.output[0].startswith(ENDS):
            continue
        operators.add(node.op_type)
        before = [one.name for one in _model().graph.initializer] + [one.output[0] for one in nodes[:place]]
        for number, name in enumerate(node.input):
            model = _model()
            model.graph.node[place].input[number] = rng.choice([one for one in before if one != name])
            assert _finding(model, tmp_path), (node.output[0], number)
    assert operators >= {"QLinearConv", "Clip", "Reshape", "Transpose", "Concat", "Cast", "Div"}


@pytest.mark.parametrize(
    ("tensor", "place", "other"),
    [
        (SHARED, 0, f"{UP}.codes.uint8"),  # codes of other channels
        (f"{BRANCH}.0.0", 1, f"{JOINED}.codes.step"),  # the step of other codes
        (f"{BRANCH}.0.0", 3, "dense_head.heads_list.1.rot.0.0.weight_codes"),
        (f"{BRANCH}.0.0", 4, "dense_head.heads_list.1.rot.0.0.weight_step"),
        (f"{BRANCH}.0.0", 6, "dense_head.heads_list.1.rot.0.0.codes.step"),
        (f"{BRANCH}.0.0", 8, "dense_head.heads_list.1.rot.0.0.bias_codes"),
        (f"{BRANCH}.0.0", 7, "uint8:127"),  # another zero point
        (f"{BRANCH}.0.0.codes.uint8", 0, "dense_head.heads_list.1.rot.0.0"),
        (f"{UP}.high", 0, f"{UP}.split"),
        ("head1.vel", 0, "head1.rot"),
    ],
)
def test_an_edge_to_a_tensor_of_the_same_kind_is_found(
    tensor: str, place: int, other: str, tmp_path: Path
) -> None:
    model = _model()
    node = _node(model, tensor)
    if tensor == "head1.vel":
        other = _node(model, other).input[0]
    assert node.input[place] != other
    node.input[place] = other
    assert "'" in (finding := _finding(model, tmp_path)) or " differs" in finding


def _bias_left_out(model: onnx.ModelProto) -> None:
    del _node(model, SHARED).input[8]


def _parts_exchanged(model: onnx.ModelProto) -> None:
    parts = _node(model, f"{JOINED}.codes.uint8").input
    parts[0], parts[1] = parts[1], parts[0]


def _a_part_twice(model: onnx.ModelProto) -> None:
    parts = _node(model, f"{JOINED}.codes.uint8").input
    parts[1] = parts[0]


def _a_part_of_another_range(model: onnx.ModelProto) -> None:
    amax = _values(f"{UP}.codes.amax")
    _change_number(model, f"{UP}.codes.amax", amax * 2)


def _no_limit(model: onnx.ModelProto) -> None:
    node = _node(model, f"{SHARED}.codes.uint8")
    node.op_type = "Identity"
    del node.input[1:]


def _no_moves(model: onnx.ModelProto) -> None:
    _node(model, f"{UP}.codes.uint8").input[0] = f"{UP}.clipped"


def _a_float_kernel(model: onnx.ModelProto) -> None:
    _node(model, SHARED).op_type = "Conv"


def _without_an_output(model: onnx.ModelProto) -> None:
    del model.graph.output[0]


def _a_node_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", [f"{BRANCH}.1"], ["more"]))


def _a_circle(model: onnx.ModelProto) -> None:
    _node(model, SHARED).input[0] = f"{SHARED}.codes.uint8"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_bias_left_out, f"initializer '{SHARED}.bias_codes' is not what the writer makes"),
        (_parts_exchanged, f"{JOINED}: its sources differs"),
        (_a_part_twice, "'"),
        (_a_part_of_another_range, f"'{JOINED}.codes.uint8' joins codes of 2 ranges"),
        (_no_limit, f"node '{SHARED}.codes.uint8' is not what the writer makes"),
        (_no_moves, "'"),
        (_a_float_kernel, "no ONNX file (Node with schema(::Conv:11)"),
        (_without_an_output, "'"),
        (_a_node_more, "node 'more'"),
        (_a_circle, "must be topologically sorted"),
    ],
)
def test_other_changes_are_found(change: Change, finding: str, tmp_path: Path) -> None:
    model = _model()
    change(model)
    assert finding in _finding(model, tmp_path)


@pytest.mark.parametrize("content", [lambda: b"", lambda: b"a text", lambda: fast_content(CHANGED)[:5000]])
def test_what_is_no_file(content: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(content())
    with pytest.raises(UserError, match=r"other\.onnx: no ONNX file"):
        fast_reader.read_plan(tmp_path / "other.onnx")
