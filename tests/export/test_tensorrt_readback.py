"""A TensorRT file says what its plan says; with one other number, attribute, edge or note it is another."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from dense_reference import changed, in_halves, on_the_grid
from exported_networks import W8, content_of, new_subject, subject_of
from onnx import helper, numpy_helper

from cpq_train.common.errors import UserError
from cpq_train.export.plan import Plan, differences
from cpq_train.export.planning import plan_of
from cpq_train.export.tensorrt.notes import KEY
from cpq_train.export.tensorrt.reader import read_plan
from cpq_train.export.tensorrt.writer import model_of
from cpq_train.quantization.scheme import Scheme

UPSAMPLING = "backbone_2d.deblocks.1.0"
DENSE = "backbone_2d.blocks.1.4"

EVERYTHING = {
    "defaults": {"weight": W8, "input": {"bits": 4, "narrow_range": True}},
    "rules": [
        {"layers": "dense_head.*", "input": {"bits": 8}},
        *(
            {"layers": name, "weight": "off", "input": "off"}
            for name in (DENSE, "dense_head.heads_list.1.vel.1")
        ),
    ],
}
"""Float and integer layers, limits and none."""


@cache
def _plan() -> Plan:
    plan = plan_of(new_subject(Scheme.from_dict(EVERYTHING)).network, "dense")
    plan = changed(plan, lambda one: on_the_grid(one) if "backbone" in one.name else one)
    return changed(plan, lambda one: in_halves(one) if "heads_list.0" in one.name else one)


@cache
def _content() -> bytes:
    content: bytes = model_of(_plan(), "0", "a test").SerializeToString()
    return content


def _model() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(_content())


def _finding(model: onnx.ModelProto, folder: Path) -> str:
    """What is said of a changed file; it has to be said."""
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        found = "; ".join(differences(_plan(), read_plan(path)))
    except UserError as error:
        where, _, found = str(error).partition(": ")
        found = found if where == str(path) and "\n" not in found else ""
    assert found
    return found


def test_a_file_read_again_is_its_plan(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(_content())
    found = read_plan(path)
    assert differences(_plan(), found) == []
    assert list(found.outputs) == list(_plan().outputs)
    kinds = {one.bias.dtype.name for one in found.operations if getattr(one, "bias", None) is not None}
    assert kinds == {"float32", "float16", "int32"}


def test_the_file_of_another_network_is_not_the_plan(tmp_path: Path) -> None:
    other = model_of(plan_of(subject_of("int8").network, "dense"), "0", "")
    assert _finding(other, tmp_path).count(" differs") > 20


# Numbers


def _others(values: np.ndarray) -> Iterator[np.ndarray]:
    """One number the next larger one; another type; another shape."""
    for place in {0, values.size - 1}:
        flat = values.copy().reshape(-1)
        larger = (
            np.nextafter(flat[place], np.float32(np.inf)) if flat.dtype == np.float32 else flat[place] ^ 1
        )
        flat[place] = larger
        yield flat.reshape(values.shape)
    yield values.astype(np.float64)
    yield values[..., None]
    yield values.reshape(-1)[:-1]


def test_one_other_number_is_found_wherever_it_is(tmp_path: Path) -> None:
    names = [one.name for one in _model().graph.initializer]
    ends = ("weight", "weight_codes", "weight_step", "bias", "step", "least", "most")
    assert {name.rpartition(".")[2] for name in names} == {*ends, "int8:0"}
    for place, name in enumerate(names):
        if place % 4 and name.endswith(("weight_codes", "weight_step", "bias", "step")) and "heads" in name:
            continue  # of many alike, some
        for values in _others(numpy_helper.to_array(_model().graph.initializer[place])):
            model = _model()
            model.graph.initializer[place].CopyFrom(numpy_helper.from_array(values, name))
            assert _finding(model, tmp_path), name


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("backbone_2d.blocks.0.1.weight_codes", "weight"),
        ("dense_head.shared_conv.0.weight_step", "weight_step"),
        ("dense_head.shared_conv.0.bias", "bias"),
        (f"{DENSE}.weight", "weight"),
        (f"{DENSE}.bias", "bias"),
    ],
)
def test_another_number_is_said_with_its_layer(name: str, field: str, tmp_path: Path) -> None:
    model = _model()
    one = next(one for one in model.graph.initializer if one.name == name)
    one.CopyFrom(numpy_helper.from_array(next(_others(numpy_helper.to_array(one))), name))
    assert _finding(model, tmp_path) == f"{name.rpartition('.')[0]}: its {field} differs"


def test_scales_of_the_copies_of_a_channel_are_equal(tmp_path: Path) -> None:
    for end in ("weight_step", "bias"):
        model, name = _model(), f"{UPSAMPLING}.{end}"
        one = next(one for one in model.graph.initializer if one.name == name)
        values = numpy_helper.to_array(one).copy()
        assert values[0] == values[1] == values[3] != values[4]
        values[1] = values[4]
        one.CopyFrom(numpy_helper.from_array(values, name))
        assert _finding(model, tmp_path) == f"initializer {name!r} is not what the writer makes of the rest"


def test_amax_that_have_the_same_step(tmp_path: Path) -> None:
    """The note tells them apart."""
    amax = np.float32(1.9)
    while np.nextafter(amax, np.float32(2)) / np.float32(127) != amax / np.float32(127):
        amax = np.nextafter(amax, np.float32(2))
    both = [amax, np.nextafter(amax, np.float32(2))]
    plans = [changed(_plan(), lambda one, amax=amax: _with_amax(one, float(amax))) for amax in both]
    for number, plan in enumerate(plans):
        path = tmp_path / f"{number}.onnx"
        onnx.save(model_of(plan, "0", ""), str(path))
        assert differences(plan, read_plan(path)) == []
    models = [onnx.load(str(tmp_path / f"{number}.onnx")) for number in range(2)]
    assert models[0].graph.node == models[1].graph.node
    assert len(differences(*plans)) > 10


def _with_amax(layer: Any, amax: float) -> Any:
    if layer.input_range is None:
        return layer
    return replace(layer, input_range=replace(layer.input_range, amax=amax), bias=None)


# The note


def _noted(change: Callable[[dict[str, Any]], object]) -> Callable[[onnx.ModelProto], None]:
    def changed_note(model: onnx.ModelProto) -> None:
        note = json.loads(model.metadata_props[0].value)
        change(note)
        model.metadata_props[0].value = json.dumps(note)

    return changed_note


CODES = "dense_head.shared_conv.0.codes"
SHARED = "dense_head.shared_conv.0"


def _set_first(note: dict[str, Any], code: float) -> None:
    note["biases"][UPSAMPLING][0] = code


def _no_note(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def _other_key(model: onnx.ModelProto) -> None:
    model.metadata_props[0].key = "other"


def _says(text: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.metadata_props[0].value = text

    return change


def _one_more(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="more", value="")


ANOTHER = "not made as export does it for TensorRT"
MORE = "has more than nodes and numbers"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_no_note, ANOTHER),
        (_other_key, ANOTHER),
        (_says(""), ANOTHER),
        (_says("{"), ANOTHER),
        (_says("[]"), ANOTHER),
        (_says("NaN"), ANOTHER),
        (_says('{"ranges": {}}'), ANOTHER),
        (_one_more, MORE),
        (_noted(lambda note: note.update(more=1)), MORE),
        (_noted(lambda note: note["ranges"].update(more=note["ranges"][CODES])), MORE),
        (_noted(lambda note: note["ranges"].pop(CODES)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].pop("bits")), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(bits=8.5)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(bits=10**9)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(bits=True)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(bits=7)), f"'{CODES}'"),
        (_noted(lambda note: note["ranges"][CODES].update(bits=16)), f"'{CODES}'"),
        (_noted(lambda note: note["ranges"][CODES].update(signed=0)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(narrow_range="no")), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(more=1)), MORE),
        (_noted(lambda note: note["ranges"][CODES].update(amax=0)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(amax=float("inf"))), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(amax=float("nan"))), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(amax=1e300)), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(amax="1")), ANOTHER),
        (_noted(lambda note: note["ranges"][CODES].update(amax=1.25)), f"'{CODES}.step'"),
        (_noted(lambda note: note["ranges"][CODES].update(amax=0.1 + 2**-50)), "'"),
        (_noted(lambda note: note["biases"].pop(SHARED)), ANOTHER),
        (_noted(lambda note: note["biases"].update(more="float16")), MORE),
        (_noted(lambda note: note["biases"].update({SHARED: "int32"})), ANOTHER),
        (_noted(lambda note: note["biases"].update({SHARED: [1]})), ANOTHER),
        (_noted(lambda note: note["biases"][UPSAMPLING].append(1)), ANOTHER),
        (_noted(lambda note: note["biases"][UPSAMPLING].insert(0, 1)), ANOTHER),
        (_noted(lambda note: _set_first(note, 1.5)), ANOTHER),
        (_noted(lambda note: _set_first(note, True)), ANOTHER),
        (_noted(lambda note: _set_first(note, 2**30 + 1)), ANOTHER),
        (_noted(lambda note: _set_first(note, 2**30)), f"'{UPSAMPLING}.bias'"),
        (_noted(lambda note: note["biases"].update({SHARED: "int8"})), ANOTHER),
        (_noted(lambda note: note["biases"].update({SHARED: "float16"})), f"'{SHARED}.bias'"),
        (_noted(lambda note: note["biases"].update({DENSE: [1] * 10})), "its numbers make no network"),
        (
            _noted(lambda note: note["biases"].update({UPSAMPLING: "float32"})),
            f"{UPSAMPLING}: its bias differs",
        ),
    ],
)
def test_another_note_is_found(
    change: Callable[[onnx.ModelProto], None], finding: str, tmp_path: Path
) -> None:
    model = _model()
    change(model)
    assert finding in _finding(model, tmp_path)


def test_a_note_that_is_no_fp32_number(tmp_path: Path) -> None:
    model = _model()
    assert model.metadata_props[0].key == KEY
    amax = json.loads(model.metadata_props[0].value)["ranges"][CODES]["amax"]
    _noted(lambda note: note["ranges"][CODES].update(amax=amax * (1 + 2**-50)))(model)
    assert MORE in _finding(model, tmp_path)


# Attributes and edges


def _change_attribute(attribute: onnx.AttributeProto) -> None:
    match attribute.type:
        case onnx.AttributeProto.INTS:
            attribute.ints[-1] += 1
        case onnx.AttributeProto.INT:
            attribute.i += 1
        case onnx.AttributeProto.STRING:
            attribute.s = {b"CRD": b"DCR"}[attribute.s]
        case _:
            raise AssertionError(attribute.name)


def test_one_other_attribute_is_found(tmp_path: Path) -> None:
    seen = set()
    for place, node in enumerate(_model().graph.node):
        for number, attribute in enumerate(node.attribute):
            if (node.op_type, attribute.name) in seen and place % 5:
                continue
            seen.add((node.op_type, attribute.name))
            model = _model()
            _change_attribute(model.graph.node[place].attribute[number])
            assert _finding(model, tmp_path), (node.output[0], attribute.name)
    assert seen == {
        *(("Conv", name) for name in ("kernel_shape", "strides", "pads", "dilations")),
        *(("DepthToSpace", "blocksize"), ("DepthToSpace", "mode"), ("Concat", "axis")),
        ("DequantizeLinear", "axis"),
    }


@pytest.mark.parametrize("attribute", [{"group": 2}, {"auto_pad": "SAME_UPPER"}])
def test_an_attribute_more_is_found(attribute: dict[str, Any], tmp_path: Path) -> None:
    model = _model()
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attribute.items())
    assert _finding(model, tmp_path)


def test_an_edge_to_another_tensor_is_found(tmp_path: Path) -> None:
    rng, nodes = np.random.default_rng(0), _model().graph.node
    for place, node in enumerate(nodes):
        before = [one.name for one in _model().graph.initializer] + [one.output[0] for one in nodes[:place]]
        for number, name in enumerate(node.input):
            model = _model()
            model.graph.node[place].input[number] = rng.choice([one for one in before if one != name])
            assert _finding(model, tmp_path), (node.output[0], number)


def _without_a_relu(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Identity"


def _without_an_output(model: onnx.ModelProto) -> None:
    del model.graph.output[0]


def _without_a_node(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


def _with_a_node_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", [model.graph.node[0].output[0]], ["more"]))


def _of_another_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value += 2


def _of_a_free_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _of_halves(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def _of_other_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


@pytest.mark.parametrize(
    "change",
    [
        *(_without_a_relu, _without_an_output, _without_a_node, _with_a_node_more),
        *(_of_another_size, _of_a_free_size, _of_halves, _of_other_operators),
    ],
)
def test_other_changes_are_found(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    model = _model()
    change(model)
    assert _finding(model, tmp_path)


# Other files


@pytest.mark.parametrize("content", [lambda: b"", lambda: b"a text", lambda: _content()[:5000]])
def test_what_is_no_file(content: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content())
    with pytest.raises(UserError, match="no ONNX file"):
        read_plan(path)


def test_a_portable_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content_of("int8"))
    with pytest.raises(UserError, match=ANOTHER):
        read_plan(path)


def test_damaged_bytes(tmp_path: Path) -> None:
    """Whatever is wrong is said as that, or is in what no plan holds, such as a text about the file."""
    rng, path = np.random.default_rng(0), tmp_path / "damaged.onnx"
    num_refused = num_different = 0
    for _ in range(300):
        content = bytearray(_content())
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(bytes(content))
        try:
            num_different += differences(_plan(), read_plan(path)) != []
        except UserError:
            num_refused += 1
    assert num_refused > 30
    assert num_refused + num_different > 200
