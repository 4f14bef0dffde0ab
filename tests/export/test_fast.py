"""A portable-fast file: which layers are one kernel, and codes that are the network's, hardly one aside."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dense_reference import changed, in_halves
from exported_networks import (
    CLOUDS,
    GRID,
    SMALL,
    assert_equal,
    features_of,
    float_network,
    model_of,
    run_file,
    run_network,
    session_of,
    subject_of,
    voxels,
)
from fast_files import (
    BRANCH,
    FAST_SCHEMES,
    SAME_SIZE,
    SHARED,
    UPSAMPLING,
    dense_layers,
    fast_content,
    fast_model,
    fast_plan,
    fast_subject,
    whole_biases,
)
from torch import Tensor
from torch.nn import functional

from cpq_train.common.errors import UserError
from cpq_train.export.plan import Convolution, Plan, differences
from cpq_train.export.planning import plan_of
from cpq_train.export.portable.fast import as_said, fused_layers, in_bytes, maps_in_bytes, why_not
from cpq_train.export.portable.fast_reader import read_plan
from cpq_train.export.portable.writer import portable_graph
from cpq_train.export.targets import TARGETS
from cpq_train.export.writing import plan_for
from cpq_train.quantization.reference.rulebook import Kernel
from cpq_train.quantization.switches import quantizers

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
HEADS = [
    f"dense_head.heads_list.{i}.{b}"
    for i in range(2)
    for b in ("center", "center_z", "dim", "rot", "vel", "hm")
]
HIDDEN = [f"{head}.0.0" for head in HEADS]
LAST = [f"{head}.1" for head in HEADS]
"""Layers that write the head's outputs, which are numbers."""

FIRST = "backbone_2d.blocks.0.1"

EVERY = ["every dense layer"]
EXACT = {
    **dict.fromkeys(("unsigned", "sixteen", "accumulator 16", "several widths"), EVERY),
    "mixed": HIDDEN,
    "a part in unsigned bytes": ["backbone_2d.blocks.0.4", SAME_SIZE],
    "codes up to 255": ["backbone_2d.blocks.1.7"],
    "a map in unsigned bytes": [SHARED],
    "a map in 16 bits": [SAME_SIZE, UPSAMPLING, SHARED],
    "a branch in 4 bits": [SHARED],
}
"""Scheme -> the dense layers, beside the last ones, that are no kernel from codes to codes."""


@pytest.mark.parametrize("scheme", FAST_SCHEMES)
def test_which_layers_are_one_kernel(scheme: str) -> None:
    plan, exact = fast_plan(scheme), EXACT.get(scheme, [])
    names = [layer.name for layer in dense_layers(plan)]
    fused = [] if exact is EVERY else [name for name in names if name not in (*exact, *LAST)]
    assert list(fused_layers(plan)) == fused
    nodes = onnx.ModelProto.FromString(fast_content(scheme)).graph.node
    assert [node.output[0] for node in nodes if node.op_type == "QLinearConv"] == fused
    sums = {node.name.rpartition(".")[0] for node in nodes if node.op_type in ("Conv", "ConvTranspose")}
    assert sums == set(names) - set(fused)


def _turned(model: onnx.ModelProto) -> list[str]:
    """Layers whose kernel is turned around."""
    names = [node.name for node in model.graph.node if node.op_type == "ConvTranspose"]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def test_exact_layers_of_few_outputs_are_turned() -> None:
    """Such as the shared one of 7, but none that is transposed already."""
    assert _turned(onnx.ModelProto.FromString(fast_content("int8"))) == LAST
    assert _turned(onnx.ModelProto.FromString(fast_content("a map in 16 bits"))) == [SHARED, *LAST]


def test_a_file_without_kernels_differs_from_the_portable_one_in_turned_layers() -> None:
    ours = onnx.ModelProto.FromString(fast_content("accumulator 16")).graph
    exact = portable_graph(fast_plan("accumulator 16")).model("centerpoint", "0", "").graph
    pairs = [(a, b) for a, b in zip(ours.node, exact.node, strict=True) if a != b]
    assert {(a.op_type, b.op_type) for a, b in pairs} == {("ConvTranspose", "Conv")}
    assert all((a.input, a.output) == (b.input, b.output) for a, b in pairs)
    numbers = [a.name for a, b in zip(ours.initializer, exact.initializer, strict=True) if a != b]
    layers = {a.output[0].rpartition(".")[0] for a, _ in pairs}
    assert set(numbers) == {f"{layer}.weight_codes" for layer in layers}


# Numbers


@pytest.mark.parametrize("scheme", FAST_SCHEMES)
def test_outputs_of_small_maps_are_equal(scheme: str) -> None:
    """Of eight cells: not a code of a million is one of them. Clouds without a voxel, of one, of all."""
    session = session_of(fast_content(scheme))
    for cloud in CLOUDS.values():
        coords = cloud(GRID)
        features = features_of(coords)
        expected = run_network(fast_subject(scheme).network, features, coords)
        assert_equal(run_file(session, features, coords), expected)


WIDE = replace(SMALL, point_cloud_range=(-12.8, -12.8, -5.0, 12.8, 12.8, 3.0))


@pytest.mark.parametrize("scheme", ["int8", "accumulator w4", "a part in unsigned bytes"])
def test_hardly_a_code_differs(scheme: str) -> None:
    """From those of the exact file of the same plan, whose outputs are the network's."""
    network = whole_biases(FAST_SCHEMES[scheme], network=float_network(WIDE)).network
    plan = as_said(plan_of(network))
    coords = voxels(6000, grid=network.backbone_3d.sparse_shape)
    features = features_of(coords)
    found, exact = (_codes(model, plan, features, coords) for model in (fast_model(plan), model_of(plan)))
    assert found.keys() == exact.keys() == set(plan.code_tensors().values())
    steps = torch.cat([(found[name] - exact[name]).abs().flatten() for name in exact])
    assert len(steps) > 1_500_000
    assert int((steps > 0).sum()) <= 1e-6 * len(steps)
    assert steps.max() <= 1


def _codes(model: onnx.ModelProto, plan: Plan, features: Tensor, coords: Tensor) -> dict[str, Tensor]:
    """Name of the codes in the plan -> them."""
    made = {name for node in model.graph.node for name in node.output}
    names = {name if name in made else in_bytes(name): name for name in plan.code_tensors().values()}
    found = _run(model, list(names), features, coords)
    return {names[name]: codes.float() for name, codes in found.items()}


def _run(model: onnx.ModelProto, tensors: list[str], features: Tensor, coords: Tensor) -> dict[str, Tensor]:
    """Tensors within a file."""
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    return run_file(session_of(probed.SerializeToString()), features, coords)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize(
    "scheme", ["int8", "w4a4", "accumulator w4", "codes up to 255", "a map in unsigned bytes"]
)
def test_a_kernel_computes_what_is_said_of_it(scheme: str, size: float) -> None:
    """Its codes from its codes, bit for bit, at ranges that fit and at a share of them: then all saturate."""
    subject = whole_biases(FAST_SCHEMES[scheme])
    for name, quantizer in quantizers(subject.network).items():
        if "_weight_quantizer" not in name and name.startswith(("backbone_2d", "dense_head")):
            quantizer.scale_amax(torch.tensor(size))
    plan, coords = as_said(plan_of(subject.network)), voxels(1500)
    fused, model = fused_layers(plan), fast_model(plan)
    kernels = {node.output[0]: node for node in model.graph.node if node.op_type == "QLinearConv"}
    wanted = {name: [kernels[name].input[0], _bytes_of(name)] for name in fused}
    found = _run(
        model, sorted({one for both in wanted.values() for one in both}), features_of(coords), coords
    )
    for name, written in fused.items():
        layer, (x, y) = plan[name], (found[one] for one in wanted[name])
        assert isinstance(layer, Convolution)
        assert (x.dtype, y.dtype) == (torch.uint8, torch.uint8)
        assert torch.equal(y.double(), _as_documented(layer, x, written.amax, written.largest)), name
        assert y.max() <= written.largest
        assert size == 1.0 or y.max() == written.largest


def _bytes_of(layer: str) -> str:
    """The codes that a kernel writes: read alone, or as a part of a map."""
    return in_bytes(f"{layer}.codes")


def _as_documented(layer: Convolution, x: Tensor, amax: float, largest: int) -> Tensor:
    """clip(round_half_even((acc + bias) * (step_x * step_w / step_y)), 0, largest)."""
    assert layer.input_range is not None
    assert layer.weight_step is not None
    assert layer.bias is not None
    convolve: Callable[..., Tensor] = functional.conv2d
    options = {"stride": layer.kernel.stride, "padding": layer.kernel.padding}
    if layer.kind == "ConvTranspose2d":
        convolve = functional.conv_transpose2d
    acc = convolve(x.double(), torch.from_numpy(layer.weight).double(), **options).numpy().astype(np.int64)
    total = (acc + layer.bias.astype(np.int64)[:, None, None]).astype(np.float32)
    step_x = np.float32(layer.input_range.amax) / np.float32(layer.input_range.largest)
    factor = step_x * layer.weight_step / (np.float32(amax) / np.float32(largest))
    return torch.from_numpy(np.clip(np.rint(total * factor[:, None, None]), 0, largest)).double()


@pytest.mark.parametrize("scheme", ["int8", "a part in unsigned bytes", "a branch in 4 bits"])
def test_threads_and_optimizations_change_no_bit(scheme: str) -> None:
    coords = voxels(800)
    features = features_of(coords)
    expected = run_file(session_of(fast_content(scheme)), features, coords)
    for level in LEVELS:
        for num_threads in (1, 2):
            session = session_of(fast_content(scheme), num_threads, level)
            assert_equal(run_file(session, features, coords), expected)


@pytest.mark.parametrize("size", [1e-3, 1e4, 1e20])
def test_inputs_far_inside_and_outside_the_ranges(size: float) -> None:
    coords = voxels(1500)
    features = features_of(coords, size=size)
    expected = run_network(fast_subject("int8").network, features, coords)
    assert_equal(run_file(session_of(fast_content("int8")), features, coords), expected)


# The plan as it is said


@pytest.mark.parametrize("scheme", FAST_SCHEMES)
def test_unsigned_codes_change_no_number(scheme: str) -> None:
    """The exact file of the plan with them has the network's outputs."""
    plan, coords = plan_of(fast_subject(scheme).network), voxels(1500)
    said, features = as_said(plan), features_of(coords)
    expected = run_network(fast_subject(scheme).network, features, coords)
    assert_equal(run_file(session_of(model_of(said).SerializeToString()), features, coords), expected)
    assert differences(as_said(said), said) == []
    for (_, tensor, before), (_, _, after) in zip(plan.reads(), said.reads(), strict=True):
        if before is not None and after is not None:
            assert (after.amax, after.largest) == (before.amax, before.largest)
            assert after.smallest == (0 if plan.is_non_negative(tensor) else before.smallest)


# Other plans


def _agrees_with_the_exact_file(plan: Plan, folder: Path) -> dict[str, Tensor]:
    """And is read again as it was written."""
    coords, content = voxels(1500), fast_model(plan).SerializeToString()
    features = features_of(coords)
    found = run_file(session_of(content), features, coords)
    assert_equal(found, run_file(session_of(model_of(plan).SerializeToString()), features, coords))
    (folder / "net.onnx").write_bytes(content)
    assert differences(plan, read_plan(folder / "net.onnx")) == []
    return found


@pytest.mark.parametrize(
    ("tensor", "no_longer"),
    [
        (SHARED, [SHARED]),
        ("backbone_2d.blocks.0.4", ["backbone_2d.blocks.0.4"]),
        (UPSAMPLING, [UPSAMPLING]),
        (HIDDEN[3], [HIDDEN[3]]),
        ("backbone_2d.concatenation", [SAME_SIZE, UPSAMPLING]),
        ("map_to_bev_module", []),
    ],
)
def test_an_output_that_is_read_too_stays_numbers(tensor: str, no_longer: list[str], tmp_path: Path) -> None:
    plan = fast_plan("int8")
    more = replace(plan, outputs={**plan.outputs, "more": tensor})
    assert list(fused_layers(more)) == [name for name in fused_layers(plan) if name not in no_longer]
    found = _agrees_with_the_exact_file(more, tmp_path)
    assert found["more"].dtype == torch.float32
    assert len(found["more"].unique()) > 10


def _unlike(name: str, **other: object) -> Callable[[Convolution], Convolution]:
    return lambda layer: replace(layer, **other) if layer.name == name else layer  # type: ignore[arg-type]


def test_a_layer_without_a_relu_writes_numbers(tmp_path: Path) -> None:
    """And those that read it have codes of both signs, which no such kernel reads."""
    name = "backbone_2d.blocks.1.1"
    plan = changed(plan_of(fast_subject("int8").network), _unlike(name, relu=False))
    plan = as_said(plan)
    readers = [operation.name for operation, source, _ in plan.reads() if source == name]
    lost = set(fused_layers(fast_plan("int8"))) - set(fused_layers(plan))
    assert lost == {name, *readers}
    _agrees_with_the_exact_file(plan, tmp_path)


def test_layers_without_a_bias(tmp_path: Path) -> None:
    plan = changed(fast_plan("int8"), lambda layer: layer if layer.is_sparse else replace(layer, bias=None))
    assert why_not(plan) == {}
    assert len(fused_layers(plan)) == len(fused_layers(fast_plan("int8")))
    _agrees_with_the_exact_file(plan, tmp_path)


@pytest.mark.parametrize("name", [BRANCH, "dense_head.heads_list.1.vel.0.0"])
def test_a_tensor_with_two_ranges_stays_numbers(name: str, tmp_path: Path) -> None:
    plan = fast_plan("int8")
    (chosen,) = {source: read for _, source, read in plan.reads() if source == SHARED}.values()
    assert chosen is not None
    plan = changed(plan, _unlike(name, input_range=replace(chosen, amax=2 * chosen.amax)))
    assert SHARED not in fused_layers(plan)
    assert name in fused_layers(plan)
    _agrees_with_the_exact_file(plan, tmp_path)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("widened", [1, 2])
def test_a_map_of_voxels_is_in_bytes_where_kernels_of_one_range_alone_read_it(
    widened: int, is_fused: bool, tmp_path: Path
) -> None:
    plan = fast_plan("int8")
    first = plan[FIRST]
    assert isinstance(first, Convolution)
    assert first.input_range is not None
    chosen = replace(first.input_range, amax=widened * first.input_range.amax)
    second = replace(first, name="second", input_range=chosen, relu=is_fused)
    last = plan[LAST[0]]
    assert isinstance(last, Convolution)
    weight = np.resize(last.weight, (len(last.weight), *first.weight.shape[:1], 3, 3))
    last = replace(last, name="last", source="second", weight=weight)
    place = plan.operations.index(first)
    operations = (*plan.operations[:place], second, *plan.operations[place:], last)
    outputs = {**plan.outputs, "more": "last" if is_fused else "second"}
    plan = replace(plan, operations=operations if is_fused else operations[:-1], outputs=outputs)
    assert ("second" in fused_layers(plan)) == is_fused
    is_in_bytes = {"map_to_bev_module"} == set(maps_in_bytes(plan))
    assert is_in_bytes == (is_fused and widened == 1)
    assert len(_agrees_with_the_exact_file(plan, tmp_path)["more"].unique()) > 10


@pytest.mark.parametrize(
    ("size", "padding", "dilation", "stride", "is_turned"),
    [
        ((3, 3), (2, 1), (1, 1), (1, 1), True),
        ((3, 3), (1, 1), (2, 1), (1, 1), True),
        ((3, 3), (4, 3), (2, 2), (1, 1), True),
        ((3, 2), (0, 1), (1, 1), (1, 1), True),
        ((1, 2), (0, 1), (1, 1), (1, 1), True),
        ((3, 3), (3, 1), (1, 1), (1, 1), False),
        ((3, 3), (1, 1), (1, 1), (2, 1), False),
    ],
)
def test_layers_of_few_outputs_of_any_geometry(
    size: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_turned: bool,
    tmp_path: Path,
) -> None:
    """Turned around where there is a transposed convolution that is the same."""

    def other(layer: Convolution) -> Convolution:
        weight = np.ascontiguousarray(layer.weight[..., : size[0], : size[1]])
        return replace(layer, weight=weight, kernel=Kernel(size, stride, padding, dilation))

    plan = changed(fast_plan("int8"), lambda layer: other(layer) if layer.name in LAST else layer)
    assert _turned(fast_model(plan)) == (LAST if is_turned else [])
    found = _agrees_with_the_exact_file(plan, tmp_path)
    assert all(values.std() > 0 for values in found.values())


@pytest.mark.parametrize("bias", [2**30, -(2**30), 2**24 + 1])
def test_biases_of_any_size(bias: int, tmp_path: Path) -> None:
    """All that follows is saturated or 0; sums past 2^24 are rounded once, here and there."""

    def biased(layer: Convolution) -> Convolution:
        return replace(layer, bias=None if layer.bias is None else np.full_like(layer.bias, bias))

    plan = changed(fast_plan("int8"), lambda layer: layer if layer.is_sparse else biased(layer))
    _agrees_with_the_exact_file(plan, tmp_path)


# Refusals


@pytest.mark.parametrize("scheme", ["whole", "fp16 biases"])
def test_biases_that_are_no_multiples_of_the_step_are_refused_by_name(scheme: str) -> None:
    network = subject_of(scheme).network
    plan, refused = plan_of(network), why_not(as_said(plan_of(network)))
    dense = [layer.name for layer in dense_layers(plan)]
    if scheme == "fp16 biases":
        dense = [name for name in dense if name.startswith("dense_head")]
    reason = (
        "its bias is no whole multiple of its step: set bias: accumulator in the scheme, or --snap_biases"
    )
    assert refused == dict.fromkeys(dense, reason)
    with pytest.raises(UserError) as error:
        plan_for(TARGETS["portable-fast"], network)
    assert str(error.value) == f"{len(dense)} layers cannot be exported:\n  {reason}: {', '.join(dense)}"


def test_biases_of_sparse_layers_may_be_of_any_kind() -> None:
    def sparse_in_halves(layer: Convolution) -> Convolution:
        return in_halves(layer) if layer.is_sparse else layer

    assert why_not(changed(fast_plan("int8"), sparse_in_halves)) == {}
    assert why_not(changed(fast_plan("float sparse"), lambda layer: layer)) == {}


# Form


@pytest.mark.parametrize(
    "scheme", ["int8", "mixed", "unsigned", "a part in unsigned bytes", "a map in 16 bits"]
)
def test_only_standard_operators_and_nothing_idle(scheme: str) -> None:
    model = onnx.ModelProto.FromString(fast_content(scheme))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert {node.domain for node in model.graph.node} == {""}
    read = {name for node in model.graph.node for name in node.input}
    made = {name for node in model.graph.node for name in node.output}
    outputs = {output.name for output in model.graph.output}
    assert {one.name for one in model.graph.initializer} <= read
    # A part that no kernel makes is rounded as everywhere, its step beside it: the joined map has one too.
    idle = {f"{SAME_SIZE}.codes.step"} if scheme == "a part in unsigned bytes" else set()
    assert made - outputs - read == idle


def test_codes_become_bytes_once_and_stay_bytes() -> None:
    """One cast in front of the map of voxels, one behind each tensor that an exact layer reads."""
    plan = fast_plan("int8")
    nodes = onnx.ModelProto.FromString(fast_content("int8")).graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QLinearConv"] == len(fused_layers(plan)) == 20
    to_bytes = [
        node.output[0] for node in nodes if node.op_type == "Cast" and node.output[0].endswith(".uint8")
    ]
    assert [name for name in to_bytes if "backbone_3d" not in name] == []
    scattered = next(node.input[2] for node in nodes if node.op_type == "ScatterND")
    assert scattered == in_bytes("backbone_3d.conv_out.0.codes") == to_bytes[-1]
    to_numbers = {node.input[0] for node in nodes if node.op_type == "Cast"} - set(to_bytes)
    assert {in_bytes(f"{name}.codes") for name in HIDDEN} <= to_numbers
    assert in_bytes(f"{SHARED}.codes") not in to_numbers


def test_the_same_plan_gives_the_same_bytes() -> None:
    again = as_said(plan_of(whole_biases(FAST_SCHEMES["mixed"]).network))
    assert fast_model(again).SerializeToString() == fast_content("mixed")
