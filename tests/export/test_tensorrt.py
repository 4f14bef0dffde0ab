"""Files for TensorRT: their form, what they compute in onnxruntime, and the layers that they cannot hold."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from dense_reference import changed, codes_of, in_halves, on_the_grid, reads_as, run_layer, run_plan
from exported_networks import A8, W8, new_subject, session_of, subject_of
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.export.parts import MAP
from cpq_train.export.plan import Concatenation, Convolution, InputRange, Plan, differences
from cpq_train.export.planning import plan_of
from cpq_train.export.tensorrt.lint import lint
from cpq_train.export.tensorrt.reader import read_plan
from cpq_train.export.tensorrt.trtexec import trtexec_line
from cpq_train.export.tensorrt.writer import model_of, why_not
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.scheme import Scheme

UPSAMPLING = "backbone_2d.deblocks.1.0"
DENSE = "backbone_2d.blocks.1.4"
HEAD = "dense_head.heads_list.0.hm.0.0"
BIASES = {"fp32": lambda layer: layer, "fp16": in_halves, "int32": on_the_grid}

OFF: dict[str, Any] = {"weight": "off", "input": "off"}
FLOAT_AMONG_INTEGER = {
    "defaults": {"weight": W8, "input": A8},
    "rules": [{"layers": name, **OFF} for name in (DENSE, UPSAMPLING, HEAD)],
}
"""HEAD reads a tensor that others read as codes."""


@cache
def _plan(scheme: str) -> Plan:
    if scheme == "nvidia_sparse":
        network = new_subject(Scheme.from_file(f"configs/schemes/{scheme}.yaml")).network
    elif scheme == "float among integer":
        network = new_subject(Scheme.from_dict(FLOAT_AMONG_INTEGER)).network
    else:
        network = subject_of(scheme).network
    return plan_of(network, "dense")


SAID = (
    *("int8", "w4a8", "w4a4", "per tensor", "narrow", "nvidia_sparse", "float among integer"),
    *("accumulator", "accumulator w4", "fp16 biases"),
)
"""Schemes that the target can say."""


def _model(plan: Plan) -> onnx.ModelProto:
    model: onnx.ModelProto = model_of(plan, "0", "a test")
    return model


def _map(plan: Plan, size: float = 1.0, seed: int = 0) -> Tensor:
    """Behind a ReLU, and with a few negative numbers for limits below."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, plan.num_features, *plan.grid, generator=generator) * size
    return torch.where(torch.rand(x.shape, generator=generator) < 0.9, x.abs(), x)


def _run(model: onnx.ModelProto, x: Tensor, level: str = "ORT_DISABLE_ALL") -> dict[str, Tensor]:
    """Every tensor of a file."""
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    names = {output.name for output in probed.graph.output}
    made = [node.output[0] for node in probed.graph.node if node.output[0] not in names]
    probed.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, made))
    session = session_of(probed.SerializeToString(), level=level)
    names_in_order = [output.name for output in session.get_outputs()]
    return dict(zip(names_in_order, map(torch.from_numpy, session.run(None, {MAP: x.numpy()})), strict=True))


def _convolutions(plan: Plan) -> list[Convolution]:
    return [one for one in plan.operations if isinstance(one, Convolution)]


# What it computes


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("scheme", SAID)
def test_every_layer_computes_what_the_plan_says_of_what_it_reads(scheme: str, biases: str) -> None:
    plan = changed(_plan(scheme), BIASES[biases])
    found, names = _run(_model(plan), _map(plan, 3)), plan.code_tensors()
    for layer in _convolutions(plan):
        x = found[layer.source]
        if layer.input_range is not None:
            x, read = found[names[layer.source, layer.input_range]], x
            assert x.dtype == torch.int8
            steps = (x - codes_of(read, layer.input_range)).abs()
            assert steps.max() <= 1  # a division here, a product there
            assert (steps > 0).float().mean() < 1e-3
        expected = run_layer(layer, x)
        assert found[layer.name].shape == expected.shape
        assert torch.allclose(found[layer.name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    for output, tensor in plan.outputs.items():
        assert torch.equal(found[output], found[tensor])
        assert found[output].dtype == torch.float32


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4", "narrow", "accumulator"])
def test_with_biases_on_the_grid_hardly_a_code_differs(scheme: str) -> None:
    plan = replace(changed(_plan(scheme), on_the_grid), grid=(60, 40))
    x = _map(plan, 3)
    found, (_, codes) = _run(_model(plan), x), run_plan(plan, x)
    assert set(codes) == set(plan.code_tensors().values())
    num_flipped = sum(int((found[name] != expected).sum()) for name, expected in codes.items())
    num_codes = sum(expected.numel() for expected in codes.values())
    assert num_codes > 300_000
    assert num_flipped <= 1e-5 * num_codes


@pytest.mark.parametrize("scheme", ["int8", "accumulator", "fp16 biases"])
def test_the_reference_is_the_network(scheme: str) -> None:
    network, seen = subject_of(scheme).network, list[Tensor]()
    plan = plan_of(network, "dense")
    x = _map(plan)
    with torch.no_grad():
        heads = network.dense_head(network.backbone_2d(x))
    tensors, _ = run_plan(plan, x)
    for number, head in enumerate(heads):
        for branch, values in head.items():
            assert torch.equal(tensors[plan.outputs[f"head{number}.{branch}"]], values)
            seen.append(values)
    assert len(seen) == len(plan.outputs) == 12


FORMATS = [
    *(IntegerFormat(bits, True, narrow) for bits in range(2, 9) for narrow in (False, True)),
    *(IntegerFormat(bits, False) for bits in range(2, 8)),
]


@pytest.mark.parametrize("size", [0.1, 1e4])
@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_codes_end_where_their_format_ends(chosen: IntegerFormat, size: float, tmp_path: Path) -> None:
    plan = changed(_plan("int8"), lambda layer: reads_as(layer, chosen))
    assert why_not(plan) == {}
    model, x = _model(plan), _map(plan, size)
    found = _run(model, x)
    for (tensor, read_as), name in plan.code_tensors().items():
        codes, expected = found[name], codes_of(found[tensor], read_as)
        assert ((codes - expected).abs() > 0).float().mean() < 1e-3
        assert chosen.qmin <= codes.min()
        assert codes.max() <= chosen.qmax
    first = found[plan.code_tensors()[plan.source, _range_of(plan)]]
    if size > 1:
        assert (int(first.min()), int(first.max())) == (chosen.qmin, chosen.qmax)
    onnx.save(model, str(tmp_path / "net.onnx"))
    assert differences(plan, read_plan(tmp_path / "net.onnx")) == []


def _range_of(plan: Plan) -> InputRange:
    chosen = next(layer.input_range for layer in _convolutions(plan) if layer.source == plan.source)
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("bits", [8, 20, 23, 24, 25, 30])
def test_whole_biases_of_any_size_come_back(bits: int, tmp_path: Path) -> None:
    """Also where fp32 has one number for several codes."""
    rng = np.random.default_rng(0)

    def with_codes(layer: Convolution) -> Convolution:
        codes = rng.integers(-(2**bits), 2**bits, on_the_grid(layer).bias.shape, endpoint=True)
        return replace(layer, bias=codes.astype(np.int32))

    plan = changed(_plan("int8"), with_codes)
    assert why_not(plan) == {}
    onnx.save(_model(plan), str(tmp_path / "net.onnx"))
    assert differences(plan, read_plan(tmp_path / "net.onnx")) == []


# Form


def test_the_ends_of_a_file() -> None:
    plan = _plan("int8")
    graph = _model(plan).graph
    (source,) = graph.input
    assert source.name == MAP == "spatial_features"
    for end in (source, *graph.output):
        assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [dim.dim_value for dim in source.type.tensor_type.shape.dim] == [1, 30, 4, 2]
    assert [output.name for output in graph.output] == list(plan.outputs)


def test_one_pair_for_each_tensor_and_range_in_front_of_its_readers() -> None:
    plan = _plan("int8")
    nodes = _model(plan).graph.node
    makers = {node.output[0]: node for node in nodes}
    pairs = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(pairs) == len(plan.code_tensors()) < len(_convolutions(plan))
    for node in nodes:
        if node.op_type == "Conv":
            second = makers[node.input[0]]
            first = makers[second.input[0]]
            assert (first.op_type, second.op_type) == ("QuantizeLinear", "DequantizeLinear")
            assert first.input[1:] == second.input[1:]
    (joined,) = [node for node in nodes if node.op_type == "Concat"]
    assert {makers[name].op_type for name in joined.input} == {"DepthToSpace"}
    for output in plan.outputs.values():
        assert makers[output].op_type == "Conv"


def test_a_tensor_that_two_ranges_read_has_two_pairs() -> None:
    plan = changed(_plan("int8"), lambda one: _with_twice_the_range(one) if one.name == HEAD else one)
    found = _run(_model(plan), _map(plan))
    source = plan[HEAD].sources[0]
    first, second = found[f"{source}.codes"], found[f"{source}.codes2"]
    assert first.max() > second.max() > 0


def _with_twice_the_range(layer: Convolution) -> Convolution:
    assert layer.input_range is not None
    return replace(layer, input_range=replace(layer.input_range, amax=2 * layer.input_range.amax))


def test_float_layers_are_plain_convolutions() -> None:
    plan = _plan("nvidia_sparse")
    model = _model(plan)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert set(kinds) == {"Identity", "Conv", "Relu", "DepthToSpace", "Concat"}
    assert kinds["Conv"] == len(_convolutions(plan))
    assert {one.data_type for one in model.graph.initializer} == {onnx.TensorProto.FLOAT}


def test_weights_of_4_bits_are_int8_codes() -> None:
    model = _model(_plan("w4a8"))
    numbers = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    codes = numbers[f"{DENSE}.weight_codes"]
    assert codes.dtype == np.int8
    assert (max(codes.min(), -7), codes.max()) == (-7, 7)


def test_what_narrow_ranges_cost() -> None:
    """Behind a ReLU no code is negative, so only the map of the sparse part needs a limit."""
    clips = {
        name: [n.output[0] for n in _model(_plan(name)).graph.node if n.op_type == "Clip"] for name in SAID
    }
    assert clips["int8"] == clips["w4a8"] == []
    assert clips["narrow"] == ["map_to_bev_module.codes.clipped"]
    assert len(clips["w4a4"]) == len(_plan("w4a4").code_tensors())


@pytest.mark.parametrize("scheme", SAID)
def test_written_files_keep_every_rule(scheme: str) -> None:
    assert lint(_model(_plan(scheme))) == []


def test_a_plan_gives_the_same_bytes_again() -> None:
    one, other = (_model(_plan("w4a4")).SerializeToString() for _ in range(2))
    assert one == other


# What it cannot hold


@pytest.mark.parametrize(
    ("chosen", "largest"),
    [
        (IntegerFormat(8, signed=False), 255),
        (IntegerFormat(9), 255),
        (IntegerFormat(16), 32767),
        (IntegerFormat(16, signed=False), 65535),
    ],
)
@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, HEAD])
def test_codes_above_127(name: str, chosen: IntegerFormat, largest: int) -> None:
    plan = changed(_plan("int8"), lambda one: reads_as(one, chosen) if one.name == name else one)
    assert why_not(plan) == {
        name: f"codes of its input up to {largest}: TensorRT's go up to 127; give it "
        "input: {bits: 8, signed: true}"
    }


def test_what_works_on_voxels() -> None:
    plan = plan_of(subject_of("int8").network)
    refused = why_not(plan)
    on_maps = [one.name for one in plan.operations if isinstance(one, Concatenation) or not _is_sparse(one)]
    assert [one.name for one in plan.operations if one.name not in refused] == on_maps
    assert set(refused.values()) == {
        "works on voxels, for which TensorRT has no operators: export them to another target"
    }


def _is_sparse(operation: Any) -> bool:
    return not isinstance(operation, Convolution) or operation.is_sparse


def test_what_tensorrt_would_not_take_is_not_written() -> None:
    def without_a_step(layer: Convolution) -> Convolution:
        return replace(layer, weight_step=np.zeros_like(layer.weight_step)) if layer.name == DENSE else layer

    with pytest.raises(UserError, match="TensorRT would not take the file:\n  ") as error:
        _model(changed(_plan("int8"), without_a_step))
    assert f"\n  {DENSE}.weight: scales from 0 to 0 (scale: " in str(error.value)


# Building it


def test_the_line_for_trtexec() -> None:
    assert trtexec_line(Path("out/net.onnx")) == (
        "trtexec --onnx=out/net.onnx --saveEngine=out/net.engine --stronglyTyped --noTF32"
    )
    assert "'--onnx=my files/net.onnx'" in trtexec_line(Path("my files/net.onnx"))
