"""A file says what its plan says; with one other number, attribute or edge it does not pass for it."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported_networks import SCHEMES, content_of, model_of, new_subject, scheme_of, subject_of, write
from onnx import helper, numpy_helper

from cpq_train.common.errors import UserError
from cpq_train.export import targets, writing
from cpq_train.export.plan import Plan, differences
from cpq_train.export.planning import plan_of
from cpq_train.export.portable.reader import read_plan
from cpq_train.export.sidecar import read_sidecar, sidecar_path
from cpq_train.export.targets import TARGETS
from cpq_train.export.writing import check_written

CHANGED = "unsigned"
"""The scheme of the files that are changed: float and integer sparse layers, digits, dense layers, adds."""

Change = Callable[[onnx.ModelProto], None]


@cache
def _plan() -> Plan:
    return plan_of(subject_of(CHANGED).network)


def _model() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(content_of(CHANGED))


def _finding(model: onnx.ModelProto, folder: Path) -> str:
    """What is said of a changed file; it has to be said."""
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError) as error:
        check_written(path, _plan(), TARGETS["portable"])
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_read_again_is_its_plan(scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content_of(scheme))
    plan, found = plan_of(subject_of(scheme).network), read_plan(path)
    assert differences(plan, found) == []
    assert list(found.outputs) == list(plan.outputs)
    check_written(path, plan, TARGETS["portable"])


@pytest.mark.parametrize("other", ["int8", "w4a8", "whole", "narrow"])
def test_the_file_of_another_network_is_not_the_plan(other: str, tmp_path: Path) -> None:
    finding = _finding(onnx.ModelProto.FromString(content_of(other)), tmp_path)
    assert finding.startswith("what was written is not the plan:\n  ")
    assert finding.count(" differs") > 20


# Numbers


def _kind(name: str) -> str:
    """What an initializer is: the part of its name that is no layer's and no number."""
    if ":" in name:
        return re.sub(r"(:\w+?)\d+$", r"\1", name) if name.startswith("zeros") else name.split(":")[0]
    return re.sub(r"\d+$", "", name.rpartition(".")[2])


@cache
def _initializers() -> dict[str, list[str]]:
    """Kind -> names."""
    kinds: dict[str, list[str]] = {}
    for one in _model().graph.initializer:
        kinds.setdefault(_kind(one.name), []).append(one.name)
    return kinds


def _other(values: np.ndarray, place: int) -> np.ndarray:
    """One number the next larger one."""
    flat = values.copy().reshape(-1)
    if flat.dtype == np.float32:
        flat[place] = np.nextafter(flat[place], np.float32(np.inf))
    else:
        flat[place] = flat[place] - 1 if flat[place] == np.iinfo(flat.dtype).max else flat[place] + 1
    return flat.reshape(values.shape)


def _change_number(model: onnx.ModelProto, name: str, place: int) -> None:
    one = next(one for one in model.graph.initializer if one.name == name)
    one.CopyFrom(numpy_helper.from_array(_other(numpy_helper.to_array(one), place), name))


NUMBERS = (
    *("weight", "weight_codes", "weight_step", "bias", "amax", "number", "offsets"),
    *("ints", "int32", "int64", "present", "zeros:float", "zeros:uint"),
)


def test_kinds_of_numbers() -> None:
    assert set(_initializers()) == set(NUMBERS)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("kind", NUMBERS)
def test_one_other_number_is_found(kind: str, place: int, tmp_path: Path) -> None:
    names = _initializers()[kind]
    for name in names if kind == "int64" else {names[0], names[len(names) // 2], names[-1]}:
        model = _model()
        _change_number(model, name, place)
        finding = _finding(model, tmp_path)
        field = {"weight": "weight", "weight_codes": "weight", "weight_step": "weight_step", "bias": "bias"}
        if kind in field:
            layer = name.rpartition(".")[0]
            assert finding == f"what was written is not the plan:\n  {layer}: its {field[kind]} differs"
        elif kind == "amax":
            assert finding.startswith("what was written is not the plan:\n  ")
            assert "its input_range differs" in finding or "its ranges differs" in finding
        else:
            assert re.search(r"'\S+'", finding), finding  # names a tensor


def test_all_ints_of_the_file_count(tmp_path: Path) -> None:
    for name in _initializers()["ints"]:
        model = _model()
        _change_number(model, name, 0)
        assert _finding(model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.astype(np.float64),
        lambda values: values[..., None],
        lambda values: values.reshape(-1)[:-1],
    ],
)
@pytest.mark.parametrize("kind", ["weight_codes", "weight_step", "bias", "amax", "offsets"])
def test_other_types_and_shapes_are_found(
    kind: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    model, name = _model(), _initializers()[kind][-1]
    one = next(one for one in model.graph.initializer if one.name == name)
    one.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(one)), name))
    assert _finding(model, tmp_path)


# Attributes and edges


def _attributes() -> list[tuple[str, str]]:
    found = {(node.op_type, one.name): None for node in _model().graph.node for one in node.attribute}
    return list(found)


def _change_attribute(attribute: onnx.AttributeProto) -> None:
    match attribute.type:
        case onnx.AttributeProto.INTS:
            attribute.ints[-1] += 1
        case onnx.AttributeProto.INT:
            attribute.i = int(not attribute.i) if attribute.name in ("axis", "keepdims") else attribute.i + 1
        case onnx.AttributeProto.STRING:
            attribute.s = {b"CRD": b"DCR"}[attribute.s]
        case onnx.AttributeProto.TENSOR:
            values = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(values + values.dtype.type(1)))
        case _:
            raise AssertionError(attribute.name)


def test_kinds_of_attributes() -> None:
    geometry = ("kernel_shape", "strides", "pads", "dilations")
    assert set(_attributes()) == {
        *(("Conv", name) for name in geometry),
        *(("MaxPool", name) for name in geometry),
        *(("DepthToSpace", "blocksize"), ("DepthToSpace", "mode")),
        *(("Cast", "to"), ("Shape", "start"), ("Shape", "end"), ("ConstantOfShape", "value")),
        *(("ReduceSum", "keepdims"), ("Transpose", "perm")),
        *((operator, "axis") for operator in ("ScatterElements", "Gather", "Concat")),
    }


@pytest.mark.parametrize(("operator", "name"), _attributes())
def test_one_other_attribute_is_found(operator: str, name: str, tmp_path: Path) -> None:
    model = _model()
    nodes = [
        n for n in model.graph.node if n.op_type == operator and any(a.name == name for a in n.attribute)
    ]
    for place in {0, len(nodes) // 2, len(nodes) - 1}:
        model = _model()
        node = next(node for node in model.graph.node if node.output[0] == nodes[place].output[0])
        _change_attribute(next(one for one in node.attribute if one.name == name))
        assert _finding(model, tmp_path)


@pytest.mark.parametrize(
    ("operator", "attribute"),
    [
        ("MaxPool", {"ceil_mode": 1}),
        ("MaxPool", {"storage_order": 1}),
        ("Conv", {"group": 2}),
        ("Conv", {"auto_pad": "SAME_UPPER"}),
        ("ScatterND", {"reduction": "add"}),
    ],
)
def test_an_attribute_more_is_found(operator: str, attribute: dict[str, Any], tmp_path: Path) -> None:
    model = _model()
    node = next(node for node in model.graph.node if node.op_type == operator)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attribute.items())
    assert f"node '{node.output[0]}' is not what the writer makes" in _finding(model, tmp_path)


def _inputs() -> list[tuple[str, int]]:
    nodes = _model().graph.node
    return list({(node.op_type, place): None for node in nodes for place in range(len(node.input))})


@pytest.mark.parametrize(("operator", "place"), _inputs())
def test_an_edge_to_another_tensor_is_found(operator: str, place: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [n for n in _model().graph.node if n.op_type == operator and len(n.input) > place]
    for chosen in {0, len(nodes) // 2, len(nodes) - 1}:
        model = _model()
        before = [one.name for one in model.graph.initializer]
        for node in model.graph.node:
            if node.output[0] == nodes[chosen].output[0]:
                break
            before.append(node.output[0])
        node.input[place] = rng.choice([name for name in before if name != node.input[place]])
        finding = _finding(model, tmp_path)
        assert "'" in finding or " differs" in finding


def _points_as(model: onnx.ModelProto, name: str, other: str, place: int = 0) -> None:
    """A node reads what an earlier node reads."""
    a, b = (next(node for node in model.graph.node if node.output[0] == one) for one in (name, other))
    assert a.input[place] != b.input[place]
    a.input[place] = b.input[place]


HEADS = "dense_head.heads_list.0"


@pytest.mark.parametrize(
    ("name", "other", "place", "finding"),
    [
        ("head0.vel", "head0.center", 0, "node 'dense_head.heads_list.0.vel.0.0.weight'"),
        (f"{HEADS}.vel.1.sum0", f"{HEADS}.center.1.sum0", 0, f"{HEADS}.vel.1' has another step"),
        (f"{HEADS}.vel.1.sum0", f"{HEADS}.center.1.sum0", 1, f"node '{HEADS}.vel.1.sum0'"),
        ("backbone_3d.conv1.1.conv2.met0", "backbone_3d.conv1.0.conv2.met0", 0, "another step"),
        ("backbone_3d.conv2.1.conv1.met1", "backbone_3d.conv2.1.conv1.met0", 0, "node '"),
        ("backbone_3d.conv2.1.conv1.met0", "backbone_3d.conv1.1.conv1.met0", 1, "node '"),
        ("backbone_3d.conv_input.0.part1", "backbone_3d.conv_input.0.part0", 1, "node '"),
        ("backbone_3d.conv_input.0.sum1", "backbone_3d.conv_input.0.sum0", 1, "node '"),
        ("backbone_3d.conv1.1.quant_add.term0", "backbone_3d.conv1.0.quant_add.term0", 1, "node '"),
    ],
)
def test_an_edge_to_a_tensor_of_the_same_kind_is_found(
    name: str, other: str, place: int, finding: str, tmp_path: Path
) -> None:
    model = _model()
    _points_as(model, name, other, place)
    assert finding in _finding(model, tmp_path)


def test_a_circle_is_found(tmp_path: Path) -> None:
    model = _model()
    node = next(node for node in model.graph.node if node.output[0] == f"{HEADS}.vel.1.sum")
    node.input[0] = node.output[0]
    assert "must be topologically sorted" in _finding(model, tmp_path)


def _without_a_relu(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.output[0] == "dense_head.shared_conv.0")
    assert node.op_type == "Relu"
    node.op_type = "Identity"


def _with_a_node_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", [model.graph.node[0].output[0]], ["more"]))


def _with_a_number_more(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1), "more"))


def _without_an_output(model: onnx.ModelProto) -> None:
    del model.graph.output[0]


def _of_other_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


def _with_an_input_of_another_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_without_a_relu, "'dense_head.shared_conv.0"),
        (_with_a_node_more, "'more'"),
        (_with_a_number_more, "initializer 'more'"),
        (_without_an_output, "node 'dense_head.heads_list.0.center.0.0.weight'"),
        (_of_other_operators, "another version of the operators"),
        (_with_an_input_of_another_size, "num_features is 5 and 4"),
    ],
)
def test_other_changes_are_found(change: Change, finding: str, tmp_path: Path) -> None:
    model = _model()
    change(model)
    assert finding in _finding(model, tmp_path)


# Other files


def _of_something_else() -> bytes:
    one = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [one], [two])
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"a text\nof two lines", "no ONNX file"),
        (lambda: b"", "no ONNX file"),
        (lambda: content_of(CHANGED)[:5000], "no ONNX file"),
        (_of_something_else, "tensor 'y': Relu makes it; expected Identity"),
    ],
)
def test_another_file_is_named(content: Callable[[], bytes], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content())
    with pytest.raises(UserError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no.onnx'}: no ONNX file")):
        read_plan(tmp_path / "no.onnx")


# What is written in the end


@pytest.fixture(params=[False, True], ids=["nothing before", "an older pair"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param:
        write(subject_of("int8"), tmp_path)
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "a.ckpt"}


def _writes_one_code_too_many(monkeypatch: pytest.MonkeyPatch) -> str:
    def wrong(plan: Plan) -> Any:
        layer = next(o for o in plan.operations if o.name == "backbone_2d.blocks.0.1")
        layer.weight.reshape(-1)[0] ^= 1
        try:
            return graph_of(plan)
        finally:
            layer.weight.reshape(-1)[0] ^= 1

    graph_of = targets.portable_graph
    monkeypatch.setattr(targets, "portable_graph", wrong)
    return "what was written is not the plan:\n  backbone_2d.blocks.0.1: its weight differs"


def _writes_half(monkeypatch: pytest.MonkeyPatch) -> str:
    def wrong(model: onnx.ModelProto, path: str) -> None:
        content = model.SerializeToString()
        Path(path).write_bytes(content[: len(content) // 2])

    monkeypatch.setattr(writing.onnx, "save", wrong)
    return "no ONNX file"


@pytest.mark.parametrize("wrong", [_writes_one_code_too_many, _writes_half])
def test_what_is_not_the_plan_leaves_no_file(
    wrong: Callable[[pytest.MonkeyPatch], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(folder)
    finding = wrong(monkeypatch)
    with pytest.raises(UserError, match=re.escape(finding)):
        write(subject_of("w4a8"), folder)
    assert _contents(folder) == before
    assert set(before) in (set(), {"net.onnx", "net.json"})


def test_what_is_written_replaces_an_older_pair(folder: Path) -> None:
    path, sidecar = write(subject_of("w4a8"), folder)
    assert set(_contents(folder)) == {"net.onnx", "net.json"}
    assert asdict(read_sidecar(path)) == json.loads(json.dumps(asdict(sidecar)))
    assert sidecar.scheme == scheme_of("w4a8").to_dict()
    assert differences(plan_of(subject_of("w4a8").network), read_plan(path)) == []


def test_a_sidecar_says_what_goes_in_and_out(tmp_path: Path) -> None:
    path, _ = write(subject_of("int8"), tmp_path)
    said = json.loads(sidecar_path(path).read_text())
    model = onnx.load(path)
    for ends, stated in ((model.graph.input, said["inputs"]), (model.graph.output, said["outputs"])):
        assert [one["name"] for one in stated] == [one.name for one in ends]
        shapes = [[dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in ends]
        assert [one["shape"] for one in stated] == shapes
        types = [helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type).name for one in ends]
        assert [one["dtype"] for one in stated] == types
    assert said["checkpoint"]["arm"] == "ptq"
    assert said["versions"]["opset"] == model.opset_import[0].version


def test_two_networks_of_one_scheme_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(new_subject(scheme_of("mixed")), tmp_path / name)
    assert (tmp_path / "a/net.onnx").read_bytes() == (tmp_path / "b/net.onnx").read_bytes()
    assert model_of(_plan()).SerializeToString() == content_of(CHANGED)
