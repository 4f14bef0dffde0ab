"""The outputs of a portable file in onnxruntime are the network's, bit for bit."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported_networks import (
    A8,
    CLOUDS,
    CONV_INPUT,
    GRID,
    SCHEMES,
    SMALL,
    W8,
    assert_equal,
    calibrate,
    calibrated,
    content_of,
    features_of,
    float_network,
    model_of,
    new_subject,
    run_file,
    run_network,
    scheme_of,
    session_of,
    subject_of,
    tensor_of,
    voxels,
)
from torch import Tensor

from cpq_train.export.plan import Convolution
from cpq_train.export.planning import plan_of
from cpq_train.models import CenterPoint
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantized_layers, quantizers

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def _is_equal_to_its_file(network: CenterPoint, *clouds: str, size: float = 20) -> dict[str, Tensor]:
    session = session_of(model_of(plan_of(network)).SerializeToString())
    for cloud in clouds or ("some",):
        coords = CLOUDS[cloud](network.backbone_3d.sparse_shape)
        features = features_of(coords, size=size)
        expected = run_network(network, features, coords)
        assert_equal(run_file(session, features, coords), expected)
    return expected


@pytest.mark.parametrize(
    ("scheme", "cloud"),
    [(scheme, cloud) for scheme in SCHEMES for cloud in CLOUDS],
)
def test_outputs_are_equal(scheme: str, cloud: str) -> None:
    coords = CLOUDS[cloud](GRID)
    features = features_of(coords)
    expected = run_network(subject_of(scheme).network, features, coords)
    assert [name for name, values in expected.items() if not values.std() > 1e-3] == [] or cloud == "none"
    assert_equal(run_file(session_of(content_of(scheme)), features, coords), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-3, 1e4, 1e20])
def test_inputs_far_inside_and_outside_the_ranges(scheme: str, size: float) -> None:
    coords = voxels(1500)
    features = features_of(coords, size=size)
    features[:50] = 0
    expected = run_network(subject_of(scheme).network, features, coords)
    assert all(values.isfinite().all() for values in expected.values())
    assert_equal(run_file(session_of(content_of(scheme)), features, coords), expected)


@pytest.mark.parametrize("scheme", ["float sparse", "int8", "sixteen"])
@pytest.mark.parametrize("cloud", ["some", "all"])
def test_the_map_behind_the_sparse_layers_is_equal_before_it_is_rounded(scheme: str, cloud: str) -> None:
    """Float sums in another order would differ here in their last bits, of which codes show few."""
    network, coords = subject_of(scheme).network, CLOUDS[cloud](GRID)
    features, seen = features_of(coords), list[Tensor]()
    hook = network.map_to_bev_module.register_forward_hook(lambda *call: seen.append(call[-1]))
    run_network(network, features, coords)
    hook.remove()
    model = onnx.ModelProto.FromString(content_of(scheme))
    found = tensor_of(model, "map_to_bev_module", features, coords)
    assert found.shape == (1, 2 * 15, 4, 2)
    assert torch.equal(found, seen[0])


def test_codes_of_every_tensor_saturate() -> None:
    """Ranges of a thousandth of what comes: the largest code, and behind no ReLU the smallest one too."""
    network = calibrated("whole")
    for name, quantizer in quantizers(network).items():
        if "_weight_quantizer" not in name:
            quantizer.scale_amax(torch.tensor(1e-3))
    _is_equal_to_its_file(network, "some", "borders")


@pytest.mark.parametrize("scheme", ["int8", "float sparse", "sixteen"])
def test_threads_and_optimizations_change_no_bit(scheme: str) -> None:
    coords = voxels(800)
    features = features_of(coords)
    expected = run_network(subject_of(scheme).network, features, coords)
    for level in LEVELS:
        for num_threads in (1, 2):
            session = session_of(content_of(scheme), num_threads, level)
            assert_equal(run_file(session, features, coords), expected)


@pytest.mark.parametrize("scheme", ["int8", "w4a4", "float sparse"])
def test_the_order_of_voxels_changes_no_bit(scheme: str) -> None:
    coords = voxels(800)
    features, session = features_of(coords), session_of(content_of(scheme))
    expected = run_file(session, features, coords)
    by_cell = sorted(range(len(coords)), key=lambda row: coords[row].tolist())
    for order in (torch.tensor(by_cell), torch.randperm(len(coords))):
        assert_equal(run_file(session, features[order], coords[order]), expected)


WIDE = replace(
    SMALL, backbone_2d_channels=(96, 10), backbone_2d_num_layers=(2, 1), upsample_channels=(64, 64)
)
LIMIT = 255 * 127 * 96 * 6
"""A sum of codes that are all as large as can be, the map being two cells wide."""


@pytest.mark.parametrize("sign", [1, -1])
def test_dense_sums_past_2_to_the_24_take_digits(sign: int) -> None:
    layer = "backbone_2d.blocks.0.4"
    network = _of_largest_codes(layer, sign)
    model = model_of(plan_of(network))
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert [f"{layer}.sum{number}" for number in range(3) if f"{layer}.sum{number}" in convolutions] == [
        f"{layer}.sum0",
        f"{layer}.sum1",
    ]
    session, coords = session_of(model.SerializeToString()), voxels(2000)
    features = features_of(coords)
    assert_equal(run_file(session, features, coords), run_network(network, features, coords))
    sums = tensor_of(model, f"{layer}.sum", features, coords).numpy() * sign
    assert sums.max() == LIMIT > 2**24


def _of_largest_codes(layer: str, sign: int) -> CenterPoint:
    """A network whose inputs are far above their ranges, with weights of 0.1; one layer has +-0.1."""
    network = new_subject(scheme_of("unsigned"), float_network(WIDE)).network
    with torch.no_grad():
        for name, convolution in quantized_layers(network).items():
            convolution._input_quantizer.set_amax(torch.tensor(1e-3))
            if convolution.kind != "ResidualAdd":
                convolution.weight.fill_(0.1 * (sign if name == layer else 1))
                convolution.bias.fill_(1.0)
                convolution._weight_quantizer.set_amax_from(convolution.weight)
    return network


@pytest.mark.parametrize(
    ("fmt", "has_relu"),
    [(IntegerFormat(8, signed=False), True), (IntegerFormat(9), True), (IntegerFormat(9), False)],
)
def test_codes_of_both_signs_take_digits_where_those_of_one_do_not(
    fmt: IntegerFormat, has_relu: bool
) -> None:
    """Half the weights are negative: sums of either half stay below 2^24, those of both with signs do not."""
    before, layer = "backbone_2d.blocks.0.1", "backbone_2d.blocks.0.4"
    network = _of_largest_codes(layer, 1)
    signs = torch.tensor([1.0, -1.0]).repeat(48)
    convolution = network.get_submodule(layer)
    convolution.weight.data = convolution.weight.data * signs.view(1, -1, 1, 1)
    network.get_submodule(before).bias.data = signs.clone()
    convolution._input_quantizer.format = fmt
    if not has_relu:
        network.backbone_2d.blocks[0][3] = torch.nn.Identity()
    model = model_of(plan_of(network))
    names = [node.name for node in model.graph.node if node.name.startswith(f"{layer}.sum")]
    assert len(names) == (1 if has_relu else 2)
    session, coords = session_of(model.SerializeToString()), voxels(2000)
    features = features_of(coords)
    assert_equal(run_file(session, features, coords), run_network(network, features, coords))
    sums = tensor_of(model, f"{layer}.sum", features, coords)
    assert sums.max() == 6 * 48 * 127 * (255 if has_relu else 255 + 256)


def test_channels_without_a_weight() -> None:
    """Their range is 0 and their step 1; what is left of them is the bias."""
    network = calibrated("int8")
    _zero_every_other_channel(network)
    expected = _is_equal_to_its_file(network, "some", "none")
    for values in expected.values():
        constant = values[0, ::2].flatten(1)
        assert (constant == constant[:, :1]).all()


def _zero_every_other_channel(network: CenterPoint) -> None:
    with torch.no_grad():
        for layer in quantized_layers(network).values():
            if layer.kind != "ResidualAdd":
                for channel in layer.weight.unbind(layer.axes.output)[::2]:
                    channel.zero_()
                layer._weight_quantizer.set_amax_from(layer.weight)
                assert (layer._weight_quantizer.amax == 0).any()


@pytest.mark.parametrize("codes", [(127, 1), (1, 127)])
def test_readers_of_one_tensor_whose_sums_take_digits_of_other_widths(codes: tuple[int, int]) -> None:
    """Hidden layers of the head read one tensor of 16-bit codes, as three digits of 7 bits or two of 14."""
    network = new_subject(scheme_of("sixteen"), float_network(replace(SMALL, head_channels=60))).network
    assert {code: int(np.log2(2**24 // (60 * 9 * code))) for code in codes} == {127: 7, 1: 14}
    hidden = [o for o, source, _ in plan_of(network).reads() if source == "dense_head.shared_conv.0"]
    for number, operation in enumerate(hidden):
        assert isinstance(operation, Convolution)
        _set_codes(network, {operation.name: np.full_like(operation.weight, codes[number % 2])})
    calibrate(network)
    _is_equal_to_its_file(network)


def _set_codes(network: CenterPoint, codes: dict[str, Any]) -> None:
    for name, weight in codes.items():
        layer = network.get_submodule(name)
        layer.weight.data = torch.from_numpy(weight).float()
        layer._weight_quantizer.set_amax(torch.full_like(layer._weight_quantizer.amax, 127.0))


def test_ranges_that_were_learned() -> None:
    """amax follows from its logarithm, and not even a rounding of the last bit lies between the two."""
    network = calibrated("int8")
    for quantizer in quantizers(network).values():
        quantizer.learn()
        with torch.no_grad():
            quantizer._log_amax.add_(0.01)
    plan = plan_of(network)
    coords = voxels(500)
    features = features_of(coords)
    expected = run_network(network, features, coords)
    assert_equal(run_file(session_of(model_of(plan).SerializeToString()), features, coords), expected)


@pytest.mark.parametrize("strides", [((1, 2), (1, 2)), ((2, 2), (2, 4)), ((1, 2), (2, 4)), ((1,), (1,))])
def test_other_shapes_of_the_map(strides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    num = len(strides[0])
    config = replace(
        SMALL,
        voxel_size=(0.2, 0.2, 0.32),
        point_cloud_range=(-3.2, -6.4, -5.0, 3.2, 6.4, 3.0),
        num_point_features=5,
        backbone_2d_strides=strides[0],
        upsample_strides=strides[1],
        backbone_2d_num_layers=(1,) * num,
        backbone_2d_channels=(5, 7)[:num],
        upsample_channels=(4, 3)[:num],
    )
    scheme = Scheme.from_dict({"defaults": {"weight": W8, "input": A8}, "rules": [CONV_INPUT]})
    _is_equal_to_its_file(new_subject(scheme, float_network(config)).network, "some", "borders", "none")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_standard_operators_and_nothing_idle(scheme: str) -> None:
    model = onnx.ModelProto.FromString(content_of(scheme))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {node.op_type for node in model.graph.node} <= known
    read = {name for node in model.graph.node for name in node.input}
    made = {name for node in model.graph.node for name in node.output}
    outputs = {output.name for output in model.graph.output}
    initializers = {one.name for one in model.graph.initializer}
    assert initializers <= read
    assert {one.name for one in model.graph.input} == {"voxel_features", "voxel_coords"} <= read
    assert made - outputs - read == set()


def test_the_ends_of_a_file() -> None:
    model = onnx.ModelProto.FromString(content_of("int8"))
    ends = [
        (
            one.name,
            one.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim],
        )
        for one in (*model.graph.input, *model.graph.output)
    ]
    channels = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2}
    assert ends == [
        ("voxel_features", onnx.TensorProto.FLOAT, ["V", 5]),
        ("voxel_coords", onnx.TensorProto.INT32, ["V", 3]),
        *(
            (f"head{head}.{branch}", onnx.TensorProto.FLOAT, [1, count, 4, 2])
            for head, num_classes in enumerate((1, 2))
            for branch, count in {**channels, "hm": num_classes}.items()
        ),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_network_gives_the_same_bytes(scheme: str) -> None:
    again = model_of(plan_of(calibrated(scheme)))
    assert again.SerializeToString() == content_of(scheme)


def test_tables_and_codes_are_made_once() -> None:
    """Three tables of the first stage would be one too many, and a Clip is a tensor's codes."""
    nodes = onnx.ModelProto.FromString(content_of("int8")).graph.node
    plan = plan_of(subject_of("int8").network)
    assert sum(node.op_type == "Clip" for node in nodes) == len(plan.code_tensors())
    tables = [node.output[0] for node in nodes if node.op_type == "Gather" and ".table" in node.output[0]]
    assert len(tables) == len(set(tables)) == 8  # four stages, three strided layers and conv_out


def test_digits_are_where_codes_pass_seven_bits() -> None:
    def num_products(scheme: str, layer: str) -> int:
        nodes = onnx.ModelProto.FromString(content_of(scheme)).graph.node
        return sum(node.name.startswith(f"{layer}.sum") for node in nodes)

    behind_relu, stage = "backbone_3d.conv2.1.conv2", "backbone_3d.conv_input.0"
    assert [num_products(scheme, behind_relu) for scheme in ("int8", "unsigned", "sixteen")] == [1, 2, 3]
    assert num_products("sixteen", stage) == 3
    assert num_products("whole", stage) == 1
    made = {node.output[0] for node in onnx.ModelProto.FromString(content_of("whole")).graph.node}
    assert {"backbone_3d.conv2.0.0.codes.uint8", "voxel_features.codes.int8"} <= made


def test_a_quantizer_of_unsigned_codes_reaches_255() -> None:
    network, top = calibrated("unsigned"), 0.0
    quantizer: Quantizer = network.get_submodule("backbone_3d.conv2.1.conv2")._input_quantizer
    quantizer.set_amax(torch.tensor(0.01))
    model = model_of(plan_of(network))
    coords = voxels(500)
    features = features_of(coords)
    name = next(n for (_, r), n in plan_of(network).code_tensors().items() if r.amax == np.float32(0.01))
    top = tensor_of(model, name, features, coords).max()
    assert top == 255
    assert_equal(
        run_file(session_of(model.SerializeToString()), features, coords),
        run_network(network, features, coords),
    )
