"""A file of libspconv says what the sparse part computes, in the form that NVIDIA's parser reads."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_networks import GRID, voxels
from hypothesis import given
from hypothesis import strategies as st
from libspconv_files import (
    SCHEMES,
    content_of,
    file_of,
    numbers,
    said,
    sparse_plan,
    subject_of,
    with_changed,
    with_half_biases,
)
from numpy.typing import NDArray

from cpq_train.export.libspconv import dialect
from cpq_train.export.libspconv.arithmetic import in_half_precision, precisions, range_of, step_of
from cpq_train.export.libspconv.reader import read_plan
from cpq_train.export.libspconv.refusals import remarks, why_not
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.parts import MAP, shapes
from cpq_train.export.plan import Addition, Convolution, HeightMap, Plan, differences
from cpq_train.export.planning import plan_of
from cpq_train.models.backbone_3d import HeightCompression
from cpq_train.quantization.reference.rulebook import Kernel
from cpq_train.sparse import SparseConvTensor

CONV_INPUT, BLOCK = "backbone_3d.conv_input.0", "backbone_3d.conv1.0"


def _nodes(scheme: str, operator: str) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in file_of(scheme).graph.node if node.op_type == operator}


def _read_again(plan: Plan, folder: Path) -> Plan:
    path = folder / "sparse.onnx"
    path.write_bytes(model_of(plan, "0", "").SerializeToString())
    return read_plan(path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_read_again_is_its_plan(scheme: str, tmp_path: Path) -> None:
    plan = sparse_plan(scheme)
    assert why_not(plan) == {}
    assert differences(plan, _read_again(plan, tmp_path)) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plan_is_that_of_the_network_but_for_what_becomes_fp16(scheme: str) -> None:
    whole, plan = plan_of(subject_of(scheme).network, "sparse"), sparse_plan(scheme)
    floats = [one.name for one in plan.operations if isinstance(one, Convolution) and one.input_range is None]
    convolutions = [one.name for one in plan.operations if isinstance(one, Convolution)]
    found = set(differences(whole, plan))
    assert found == {
        *(f"{name}: its weight differs" for name in floats),
        *(f"{name}: its bias differs" for name in convolutions),
    }
    for name in convolutions:
        before, after = whole[name], plan[name]
        assert np.array_equal(before.weight.astype(after.weight.dtype), after.weight)
        assert np.array_equal(before.bias.astype(np.float16), after.bias)


# Form


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_nvidias_files_say_of_themselves(scheme: str) -> None:
    model = file_of(scheme)
    assert [(one.domain, one.version) for one in model.opset_import] == [("ai.onnx", 11)]
    assert model.graph.name == "scn"
    assert (model.producer_name, model.ir_version) == ("cpq_train", 6)
    ends = [*model.graph.input, *model.graph.output]
    assert {one.type.tensor_type.elem_type for one in ends} == {onnx.TensorProto.FLOAT16}
    dims = [[dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in ends]
    assert dims == [[1, 5], [1, 2 * 15, 4, 2]]
    assert [one.name for one in ends] == ["voxel_features", MAP]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_are_fp16_bytes_and_weights_krsc(scheme: str) -> None:
    model = file_of(scheme)
    assert {one.data_type for one in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    found = numbers(model)
    for name, node in _nodes(scheme, "SparseConvolution").items():
        tensor, weight, bias = node.input
        assert (weight, bias) == (f"{name}.weight", f"{name}.bias")
        assert "weight" not in tensor
        assert "bias" not in tensor
        fields = said(node)
        num_in, num_out = fields["in_channels"], fields["out_channels"]
        assert found[weight].shape == (num_out, *fields["kernel_size"], num_in)
        assert found[bias].shape == (num_out,)
        assert len(fields["weight_dynamic_ranges"]) == num_out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_node_has_the_fields_of_the_table_and_no_other(scheme: str) -> None:
    for node in file_of(scheme).graph.node:
        operator, fields = dialect.OPERATORS[node.op_type], said(node)
        is_int8 = fields.get("precision") == b"int8"
        expected = {**operator.attributes, **(operator.ranges if is_int8 else {})}
        assert {one.name: one.type for one in node.attribute} == expected
        assert node.domain == ""


def test_precisions_are_those_of_nvidias_exporter() -> None:
    """What CUDA-CenterPoint/qat/onnx_export/export-scn.py sets, layer by layer."""
    fp16, int8 = b"fp16", b"int8"
    expected = {
        CONV_INPUT: (fp16, fp16),
        f"{BLOCK}.conv1": (fp16, fp16),
        f"{BLOCK}.conv2": (fp16, fp16),
        f"{BLOCK}.quant_add": (fp16, int8),
        "backbone_3d.conv_out.0": (int8, fp16),
    }
    nodes = {**_nodes("nvidia", "SparseConvolution"), **_nodes("nvidia", "Add")}
    assert len(nodes) == 1 + 2 * 5 + 3 + 1 + 5
    for name, node in nodes.items():
        fields = said(node)
        found = fields["precision"], fields["output_precision"]
        assert found == expected.get(name, (int8, int8)), name
    assert remarks(sparse_plan("nvidia")) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_node_makes_is_what_its_readers_take(scheme: str) -> None:
    """The engine asserts it (Lidar_AI_Solution, issue 319): two fp16 or two int8 tensors are added."""
    made = {"voxel_features": b"fp16"}
    for node in file_of(scheme).graph.node:
        fields = said(node)
        tensors = [name for name in node.input if not name.endswith((".weight", ".bias"))]
        taken = {made[name] for name in tensors}
        if node.op_type == "ScatterDense":
            assert taken == {b"fp16"}
        if "precision" in fields:
            assert taken == {fields["precision"]}, node.name
        (of_source,) = taken
        made[node.output[0]] = fields.get("output_precision", of_source)


def test_a_relu_follows_its_add_at_once() -> None:
    """The engine fuses the two only then."""
    nodes = list(file_of("nvidia").graph.node)
    places = [number for number, node in enumerate(nodes) if node.op_type == "Relu"]
    assert len(places) == 5
    for number in places:
        assert nodes[number - 1].op_type == "Add"
        assert list(nodes[number].input) == list(nodes[number - 1].output)


def test_activations() -> None:
    found = {name: said(node)["activation"] for name, node in _nodes("nvidia", "SparseConvolution").items()}
    assert {name for name, value in found.items() if value == b"None"} == {
        name for name in found if name.endswith(".conv2")
    }
    assert set(found.values()) == {b"ReLU", b"None"}


def test_layers_on_the_same_voxels_share_a_rulebook() -> None:
    rulebooks: dict[bytes, set[str]] = {}
    for name, node in _nodes("nvidia", "SparseConvolution").items():
        fields = said(node)
        assert (fields["rulebook"] == b"") == (fields["subm"] == 0)
        rulebooks.setdefault(fields["rulebook"], set()).add(name.split(".")[1])
    strided = rulebooks.pop(b"")
    assert strided == {"conv2", "conv3", "conv4", "conv_out"}
    assert list(rulebooks.values()) == [{"conv_input", "conv1"}, {"conv2"}, {"conv3"}, {"conv4"}]


def test_another_kernel_on_the_same_voxels_has_a_rulebook_of_its_own(tmp_path: Path) -> None:
    wide = Kernel((3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2))
    plan = with_changed(sparse_plan("nvidia"), f"{BLOCK}.conv2", kernel=wide)
    model = model_of(plan, "0", "")
    found = {n.name: said(n)["rulebook"] for n in model.graph.node if n.op_type == "SparseConvolution"}
    assert found[CONV_INPUT] == found[f"{BLOCK}.conv1"] == found["backbone_3d.conv1.1.conv2"]
    assert found[f"{BLOCK}.conv2"] not in {v for k, v in found.items() if k != f"{BLOCK}.conv2"}
    assert differences(plan, _read_again(plan, tmp_path)) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_follow_one_another(scheme: str) -> None:
    plan = sparse_plan(scheme)
    sizes = shapes(plan)
    for name, node in _nodes(scheme, "SparseConvolution").items():
        fields = said(node)
        source = (fields["in_channels"], *fields["input_spatial_shape"])
        assert source == sizes[node.input[0]]
        assert (fields["out_channels"], *fields["output_spatial_shape"]) == sizes[name]
        assert fields["output_bound"] == 200_000
    assert tuple(said(_nodes(scheme, "SparseConvolution")[CONV_INPUT])["input_spatial_shape"]) == GRID


def test_the_map_has_the_channels_of_the_network() -> None:
    """ScatterDense as the open rewrite has it for zyx, then a plain reshape: channel = c * depth + z."""
    (node,) = _nodes("nvidia", "ScatterDense").values()
    (tail,) = _nodes("nvidia", "Reshape").values()
    fields = said(node)
    assert fields["format"] == b"zyx"
    _, channels, depth, height, width = fields["output_shape"]
    assert [depth, height, width] == fields["input_spatial_shape"]
    coords = voxels(9, grid=(depth, height, width))
    features = torch.randn(9, channels, generator=torch.Generator().manual_seed(0))
    dense = np.zeros(channels * depth * height * width, np.float32)
    for (z, y, x), row in zip(coords.tolist(), features.numpy(), strict=True):
        for channel in range(channels):
            dense[channel * depth * height * width + z * height * width + y * width + x] = row[channel]
    tensor = SparseConvTensor(
        features, torch.nn.functional.pad(coords, (1, 0)), [depth, height, width], batch_size=1
    )
    expected = HeightCompression()(tensor)
    assert np.array_equal(dense.reshape(said(tail)["dims"]), expected.numpy())


def test_a_file_is_the_same_twice() -> None:
    plan = with_half_biases(plan_of(subject_of("nvidia").network, "sparse"))
    again = model_of(in_half_precision(plan), "0", "").SerializeToString()
    assert again == content_of("nvidia")


def test_version_and_documentation() -> None:
    model = model_of(sparse_plan("float"), "1.2", "a text")
    assert (model.producer_version, model.doc_string) == ("1.2", "a text")


# Numbers


def _quantized(weight: NDArray[np.float16], ranges: list[float]) -> NDArray[np.int64]:
    """As the open rewrite's kernel, in fp32: clamp(round_half_even(w / (range / 127)), -128, 127)."""
    scale = (np.array(ranges, np.float32) / np.float32(127)).reshape(-1, 1, 1, 1, 1)
    return np.clip(np.rint(weight.astype(np.float32) / scale), -128, 127).astype(np.int64)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "float"])
def test_the_engine_finds_every_code_and_every_step(scheme: str) -> None:
    model, plan = file_of(scheme), plan_of(subject_of(scheme).network, "sparse")
    found, num_layers = numbers(model), 0
    for name, node in _nodes(scheme, "SparseConvolution").items():
        fields, layer = said(node), plan[name]
        if fields["precision"] != b"int8":
            continue
        num_layers += 1
        assert np.array_equal(
            _quantized(found[f"{name}.weight"], fields["weight_dynamic_ranges"]), layer.weight
        )
        steps = np.array(fields["weight_dynamic_ranges"], np.float32) / np.float32(127)
        assert steps.tobytes() == layer.weight_step.tobytes()
        assert fields["input_dynamic_range"] == layer.input_range.amax
    assert num_layers >= 9


def test_the_ranges_of_an_add() -> None:
    plan = sparse_plan("nvidia")
    for name, node in _nodes("nvidia", "Add").items():
        fields, ranges = said(node), plan[name].ranges
        found = [fields.get(f"input{row}_dynamic_range") for row in range(2)]
        assert found == ([None, None] if ranges is None else [one.amax for one in ranges])
        assert list(node.input) == list(plan[name].sources)


def test_ranges_of_a_float_weight_are_its_largest_numbers() -> None:
    node = _nodes("nvidia", "SparseConvolution")[CONV_INPUT]
    weight = numbers(file_of("nvidia"))[f"{CONV_INPUT}.weight"]
    assert said(node)["weight_dynamic_ranges"] == [float(np.abs(one).max()) for one in weight]


@given(st.floats(2.0**-23, 2.0**100, width=32))
def test_every_step_of_8_bits_is_that_of_a_range(amax: float) -> None:
    step = np.array([amax], np.float32) / np.float32(127)
    assert step_of(range_of(step)) == step


@given(st.floats(2.0**-23, 2.0**100, width=32), st.sampled_from([1, 3, 7, 15, 31, 63]))
def test_a_step_that_no_range_near_has_has_none(amax: float, largest: int) -> None:
    """So nothing is to be gained by a search."""
    step = np.array([amax], np.float32) / np.float32(largest)
    nearest = range_of(step)
    if step_of(nearest) != step:
        for towards in (-np.inf, np.inf):
            other = nearest
            for _ in range(3):
                other = np.nextafter(other, np.float32(towards))
                assert step_of(other) != step


def test_a_dead_channel_reads_back(tmp_path: Path) -> None:
    """Its step is 1, and its codes are 0."""
    name = f"{BLOCK}.conv1"
    layer = sparse_plan("all but the first")[name]
    weight, step = layer.weight.copy(), layer.weight_step.copy()
    weight[2], step[2] = 0, 1
    plan = with_changed(sparse_plan("all but the first"), name, weight=weight, weight_step=step)
    assert why_not(plan) == {}
    assert differences(plan, _read_again(plan, tmp_path)) == []


def test_codes_at_both_ends_and_biases_of_every_kind_read_back(tmp_path: Path) -> None:
    name = "backbone_3d.conv2.0.0"
    layer = sparse_plan("nvidia")[name]
    weight, bias = layer.weight.copy(), layer.bias.copy()
    weight[0, 0, 0, 0, :2] = -128, 127
    bias[:6] = -0.0, 65504, -65504, 2.0**-24, 2.0**-15, 0
    plan = with_changed(sparse_plan("nvidia"), name, weight=weight, bias=bias)
    assert why_not(plan) == {}
    assert differences(plan, _read_again(plan, tmp_path)) == []


def test_an_add_without_a_relu_reads_back(tmp_path: Path) -> None:
    plan = with_changed(sparse_plan("nvidia"), "backbone_3d.conv3.1.quant_add", relu=False)
    assert differences(plan, _read_again(plan, tmp_path)) == []


# Half precision


def test_in_half_precision() -> None:
    plan = with_changed(plan_of(subject_of("nvidia").network, "sparse"), f"{BLOCK}.conv2", bias=None)
    half = in_half_precision(plan)
    for one in half.operations:
        before = plan[one.name]
        if not isinstance(one, Convolution):
            assert one is before
        elif one.weight_step is None:
            assert one.weight.dtype == one.bias.dtype == np.float16
            assert np.array_equal(one.weight, before.weight.astype(np.float16))
        else:
            assert one.weight is before.weight
            assert one.bias is before.bias
    assert half[f"{BLOCK}.conv2"].bias.tobytes() == bytes(2 * len(half[f"{BLOCK}.conv2"].weight))
    assert differences(half, in_half_precision(half)) == []


def test_a_layer_without_a_bias_gets_zeros_whatever_it_is(tmp_path: Path) -> None:
    plan = in_half_precision(with_changed(sparse_plan("nvidia"), bias=None))
    assert why_not(plan) == {}
    assert not any(one.bias.any() for one in plan.operations if isinstance(one, Convolution))
    assert differences(plan, _read_again(plan, tmp_path)) == []


def test_tensors_are_what_their_readers_take() -> None:
    found = precisions(sparse_plan("all but the first"))
    assert found["voxel_features"] == "fp16"
    assert {name for name, kind in found.items() if kind == "fp16"} == {
        "voxel_features",
        "backbone_3d.conv_out.0",
        "map_to_bev_module",
    }


def test_what_is_doubtful_is_said_by_name() -> None:
    (note,) = remarks(sparse_plan("all but the first"))
    assert note.startswith(f"{CONV_INPUT}: in fp16, with int8 behind it. ")
    assert remarks(sparse_plan("float")) == []


def test_a_plan_has_the_operations_that_are_written() -> None:
    kinds = {type(one) for one in sparse_plan("nvidia").operations}
    assert kinds == {Convolution, Addition, HeightMap}
    assert sparse_plan("nvidia").outputs == {MAP: "map_to_bev_module"}
