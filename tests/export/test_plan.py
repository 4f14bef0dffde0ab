"""What a plan says of a network, and that not one bit of it can differ unseen."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import GRID, SCHEMES, SMALL, calibrated, new_subject, scheme_of, subject_of
from torch import nn

from cpq_train.export.plan import (
    FEATURES,
    Addition,
    Concatenation,
    Convolution,
    HeightMap,
    InputRange,
    Operation,
    Plan,
    differences,
)
from cpq_train.export.planning import plan_of
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.reference.codes import encode_bias
from cpq_train.quantization.reference.rulebook import Kernel
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantized_layers

BLOCKS = {1: 2, 2: 1, 3: 1, 4: 1}
"""Stage -> its residual blocks."""

BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")


def _blocks_of(stage: int) -> list[str]:
    first = int(stage > 1)  # place 0 of later stages is the strided layer
    return [f"backbone_3d.conv{stage}.{first + number}" for number in range(BLOCKS[stage])]


def _expected_sources() -> dict[str, tuple[str, ...]]:
    """Every operation in the order of the pass -> what it reads, written down from the architecture."""
    sources: dict[str, tuple[str, ...]] = {"backbone_3d.conv_input.0": (FEATURES,)}
    x = "backbone_3d.conv_input.0"
    for stage in BLOCKS:
        if stage > 1:
            strided = f"backbone_3d.conv{stage}.0.0"
            sources[strided], x = (x,), strided
        for block in _blocks_of(stage):
            sources[f"{block}.conv1"] = (x,)
            sources[f"{block}.conv2"] = (f"{block}.conv1",)
            sources[f"{block}.quant_add"] = (f"{block}.conv2", x)
            x = f"{block}.quant_add"
    sources["backbone_3d.conv_out.0"] = (x,)
    sources["map_to_bev_module"] = ("backbone_3d.conv_out.0",)
    x, maps = "map_to_bev_module", []
    for level, layers in enumerate(([1, 4], [1, 4, 7])):
        for layer in layers:
            name = f"backbone_2d.blocks.{level}.{layer}"
            sources[name], x = (x,), name
        maps.append(f"backbone_2d.deblocks.{level}.0")
        sources[maps[-1]] = (x,)
    sources["backbone_2d.concatenation"] = tuple(maps)
    sources["dense_head.shared_conv.0"] = ("backbone_2d.concatenation",)
    for head in range(2):
        for branch in BRANCHES:
            hidden = f"dense_head.heads_list.{head}.{branch}.0.0"
            sources[hidden] = ("dense_head.shared_conv.0",)
            sources[f"dense_head.heads_list.{head}.{branch}.1"] = (hidden,)
    return sources


@pytest.mark.parametrize("scheme", SCHEMES)
def test_operations_stand_in_the_order_of_the_pass(scheme: str) -> None:
    plan = plan_of(subject_of(scheme).network)
    assert {o.name: o.sources for o in plan.operations} == _expected_sources()
    assert [o.name for o in plan.operations] == list(_expected_sources())
    assert (plan.num_features, plan.grid) == (5, GRID)
    assert dict(plan.outputs) == {
        f"head{head}.{branch}": f"dense_head.heads_list.{head}.{branch}.1"
        for head in range(2)
        for branch in BRANCHES
    }
    assert list(plan.outputs) == [f"head{head}.{branch}" for head in range(2) for branch in BRANCHES]


def test_relus_are_those_of_the_network() -> None:
    plan = plan_of(subject_of("int8").network)
    layers = [o for o in plan.operations if isinstance(o, Convolution | Addition)]
    assert {layer.name for layer in layers if not layer.relu} == {
        *(f"{block}.conv2" for stage in BLOCKS for block in _blocks_of(stage)),
        *plan.outputs.values(),
    }


def test_kinds_and_kernels() -> None:
    plan = plan_of(subject_of("int8").network)
    found = {o.name: (o.kind, o.kernel) for o in plan.operations if isinstance(o, Convolution)}
    ones, two, three = (1, 1, 1), (2, 2, 2), (3, 3, 3)
    same = Kernel((3, 3), (1, 1), (1, 1), (1, 1))
    for name, kind_and_kernel in found.items():
        if name.endswith((".conv1", ".conv2")) or name == "backbone_3d.conv_input.0":
            assert kind_and_kernel == ("SubMConv3d", Kernel(three, ones, ones, ones))
        if name.startswith("dense_head"):
            assert kind_and_kernel == ("Conv2d", same)
    assert found["backbone_3d.conv2.0.0"] == ("SparseConv3d", Kernel(three, two, ones, ones))
    assert found["backbone_3d.conv4.0.0"] == ("SparseConv3d", Kernel(three, two, (0, 1, 1), ones))
    assert found["backbone_3d.conv_out.0"] == (
        "SparseConv3d",
        Kernel((3, 1, 1), (2, 1, 1), (0, 0, 0), ones),
    )
    assert found["backbone_2d.blocks.0.1"] == ("Conv2d", same)
    assert found["backbone_2d.blocks.1.1"] == ("Conv2d", Kernel((3, 3), (2, 2), (1, 1), (1, 1)))
    assert found["backbone_2d.deblocks.1.0"] == (
        "ConvTranspose2d",
        Kernel((2, 2), (2, 2), (0, 0), (1, 1)),
    )


def test_padding_of_its_own_belongs_to_the_next_convolution_alone() -> None:
    network = calibrated("int8")
    level = network.backbone_2d.blocks[0]
    assert isinstance(level[0], nn.ZeroPad2d)
    level[0] = nn.ZeroPad2d((2, 2, 3, 3))  # left and right, top and bottom
    plan = plan_of(network)
    assert plan["backbone_2d.blocks.0.1"].kernel.padding == (3, 2)
    assert plan["backbone_2d.blocks.0.4"].kernel.padding == (1, 1)
    level[1].padding = (1, 4)
    assert plan_of(network)["backbone_2d.blocks.0.1"].kernel.padding == (4, 6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_are_those_of_the_layers(scheme: str) -> None:
    network = subject_of(scheme).network
    plan, quantized = plan_of(network), quantized_layers(network)
    for operation in plan.operations:
        layer = dict(network.named_modules())[operation.name]
        if isinstance(operation, Addition):
            assert (operation.ranges is not None) == (operation.name in quantized)
        if not isinstance(operation, Convolution):
            continue
        assert operation.bias.dtype == _type_of_bias(layer)
        assert np.array_equal(operation.bias, _bias_as_deployed(layer))
        if operation.name not in quantized:
            assert (operation.weight_step, operation.input_range) == (None, None)
            assert np.array_equal(operation.weight, layer.weight.detach().numpy())
            continue
        codes, step = layer._weight_quantizer.codes(layer.weight)
        assert operation.weight.dtype == np.int8
        assert np.array_equal(operation.weight, codes.detach().numpy())
        (num_out,) = operation.weight_step.shape
        assert num_out == layer.weight.shape[layer.axes.output]
        assert np.array_equal(operation.weight_step, step.flatten().expand(num_out).numpy())
        assert operation.input_range == InputRange(
            float(layer._input_quantizer.amax), layer._input_quantizer.format
        )


def _type_of_bias(layer: Any) -> Any:
    types = {"float": np.float32, "accumulator": np.int32, "fp16": np.float16}
    return types[getattr(layer, "bias_kind", "float")]


def _bias_as_deployed(layer: Any) -> Any:
    bias = layer.bias.detach().numpy()
    if _type_of_bias(layer) is not np.int32:
        return bias.astype(_type_of_bias(layer))
    steps = [q.range_of(torch.ones(1)).step for q in (layer._input_quantizer, layer._weight_quantizer)]
    return encode_bias(bias, (steps[0] * steps[1].reshape(-1)).numpy())


def _codes_of(plan: Plan, tensor: str) -> list[str]:
    return [name for (source, _), name in plan.code_tensors().items() if source == tensor]


def _ranges(plan: Plan, tensor: str) -> dict[str, InputRange | None]:
    """Reader -> the range it reads a tensor with."""
    return {operation.name: chosen for operation, source, chosen in plan.reads() if source == tensor}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_read_is_listed_once(scheme: str) -> None:
    plan = plan_of(subject_of(scheme).network)
    reads = [(operation.name, source) for operation, source, _ in plan.reads()]
    assert reads == [(name, source) for name, sources in _expected_sources().items() for source in sources]
    chosen = {(source, found) for _, source, found in plan.reads() if found is not None}
    names = plan.code_tensors()
    assert set(names) == chosen
    assert len(set(names.values())) == len(names)


def test_readers_with_equal_ranges_share_codes() -> None:
    plan = plan_of(subject_of("int8").network)
    shared = "dense_head.shared_conv.0"
    assert len(_ranges(plan, shared)) == 12
    assert len(set(_ranges(plan, shared).values())) == 1
    assert _codes_of(plan, shared) == [f"{shared}.codes"]
    level = "backbone_2d.blocks.0.4"
    assert set(_ranges(plan, level)) == {"backbone_2d.blocks.1.1", "backbone_2d.deblocks.0.0"}
    assert _codes_of(plan, level) == [f"{level}.codes"]
    assert _ranges(plan, FEATURES) == {"backbone_3d.conv_input.0": None}
    assert _codes_of(plan, FEATURES) == []
    assert _codes_of(plan_of(subject_of("whole").network), FEATURES) == [f"{FEATURES}.codes"]


@pytest.mark.parametrize("share_residual", [True, False])
def test_the_identity_of_an_add_has_the_codes_of_its_block_where_the_scheme_says_so(
    share_residual: bool,
) -> None:
    scheme = {**scheme_of("whole").to_dict(), "share_residual": share_residual}
    if not share_residual:  # with one method for all, the larger of two tensors may set both ranges
        scheme["rules"] = [{"layers": "*", "kinds": ["ResidualAdd"], "input": {"method": "mse"}}]
    plan = plan_of(new_subject(Scheme.from_dict(scheme)).network)
    identity, block = "backbone_3d.conv1.0.quant_add", "backbone_3d.conv1.1"
    assert set(_ranges(plan, identity)) == {f"{block}.conv1", f"{block}.quant_add"}
    add = plan[f"{block}.quant_add"]
    assert isinstance(add, Addition)
    assert add.ranges is not None
    assert add.ranges == (
        _ranges(plan, f"{block}.conv2")[add.name],
        _ranges(plan, identity)[add.name],
    )
    expected = [f"{identity}.codes", f"{identity}.codes2"]
    assert _codes_of(plan, identity) == expected[: 1 if share_residual else 2]
    assert (add.ranges[0] == add.ranges[1]) is not share_residual


def test_a_range_of_its_own_makes_codes_of_its_own() -> None:
    """Readers of one tensor: one has other bits, two have another amax, equal to each other."""
    network = calibrated("int8")
    shared = "dense_head.shared_conv.0"
    names = [f"dense_head.heads_list.0.{branch}.0.0" for branch in BRANCHES]
    amax = float(network.get_submodule(names[0])._input_quantizer.amax)
    changed = {
        names[1]: InputRange(amax, IntegerFormat(4)),
        names[3]: InputRange(amax * 2, IntegerFormat(8)),
        names[5]: InputRange(amax * 2, IntegerFormat(8)),
    }
    plan = plan_of(network)
    plan = replace(
        plan,
        operations=tuple(
            replace(o, input_range=changed[o.name]) if o.name in changed else o for o in plan.operations
        ),
    )
    assert _codes_of(plan, shared) == [f"{shared}.codes", f"{shared}.codes2", f"{shared}.codes3"]
    found = plan.code_tensors()
    assert found[shared, changed[names[1]]] == f"{shared}.codes2"
    assert found[shared, changed[names[3]]] == f"{shared}.codes3"


def test_what_comes_from_behind_a_relu_is_not_negative() -> None:
    plan = plan_of(subject_of("int8").network)
    assert not plan.is_non_negative(FEATURES)
    negative = {o.name for o in plan.operations if not plan.is_non_negative(o.name)}
    assert negative == {
        *(f"{block}.conv2" for stage in BLOCKS for block in _blocks_of(stage)),
        *plan.outputs.values(),
    }
    (upsampling,) = [o for o in plan.operations if o.name == "backbone_2d.deblocks.1.0"]
    without = tuple(replace(o, relu=False) if o is upsampling else o for o in plan.operations)
    assert not replace(plan, operations=without).is_non_negative("backbone_2d.concatenation")


# Differences


def _copied(operation: Operation) -> Operation:
    """The same numbers in other memory."""
    arrays = {
        field.name: getattr(operation, field.name).copy()
        for field in fields(operation)
        if isinstance(getattr(operation, field.name), np.ndarray)
    }
    return replace(operation, **arrays)


def _plan() -> Plan:
    return plan_of(subject_of("float biases").network)


def _with(plan: Plan, name: str, change: Callable[[Any], Operation]) -> Plan:
    return replace(
        plan, operations=tuple(change(_copied(o)) if o.name == name else o for o in plan.operations)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_is_its_own_equal(scheme: str) -> None:
    plan = plan_of(subject_of(scheme).network)
    assert differences(plan, plan_of(calibrated(scheme))) == []
    copies = tuple(map(_copied, plan.operations))
    assert differences(plan, replace(plan, operations=copies, outputs=dict(plan.outputs))) == []


def _changed(field: str, place: int = -1, step: bool = False) -> Callable[[Any], Operation]:
    """One number of an array more by 1, or by one unit in the last place."""

    def change(operation: Any) -> Operation:
        flat = getattr(operation, field).reshape(-1)
        flat[place] = np.nextafter(flat[place], np.float32(np.inf)) if step else flat[place] ^ 1
        return operation

    return change


def _next(chosen: InputRange) -> InputRange:
    return replace(chosen, amax=float(np.nextafter(np.float32(chosen.amax), np.float32(np.inf))))


def _format(**of: Any) -> Callable[[Any], Operation]:
    return lambda o: replace(
        o, input_range=replace(o.input_range, format=replace(o.input_range.format, **of))
    )


def _kernel(**of: Any) -> Callable[[Any], Operation]:
    return lambda o: replace(o, kernel=replace(o.kernel, **of))


SPARSE, STRIDED, FLOAT = "backbone_3d.conv2.1.conv1", "backbone_3d.conv4.0.0", "backbone_3d.conv_input.0"
DENSE, UP, ADD = "backbone_2d.blocks.1.4", "backbone_2d.deblocks.1.0", "backbone_3d.conv3.1.quant_add"

CHANGES: dict[str, tuple[str, Callable[[Any], Operation]]] = {
    **{
        f"{field} {place} {name}": (field, _changed(field, place, step))
        for field, step in (("weight", False), ("weight_step", True), ("bias", True))
        for place, name in ((0, "first"), (-1, "last"))
    },
    "bias of -0": ("bias", lambda o: replace(o, bias=-np.zeros_like(o.bias))),
    "no bias": ("bias", lambda o: replace(o, bias=None)),
    "no step": ("weight_step", lambda o: replace(o, weight_step=None)),
    "weight type": ("weight", lambda o: replace(o, weight=o.weight.view(np.uint8))),
    "weight shape": ("weight", lambda o: replace(o, weight=o.weight.reshape(-1))),
    "amax": ("input_range", lambda o: replace(o, input_range=_next(o.input_range))),
    "bits": ("input_range", _format(bits=7)),
    "unsigned": ("input_range", _format(signed=False)),
    "narrow": ("input_range", _format(narrow_range=True)),
    "no range": ("input_range", lambda o: replace(o, input_range=None)),
    "relu": ("relu", lambda o: replace(o, relu=not o.relu)),
    "source": ("source", lambda o: replace(o, source=f"{o.source}x")),
    "kind": ("kind", lambda o: replace(o, kind="Conv3d")),
    "size": ("kernel", _kernel(size=(1, 1))),
    "stride": ("kernel", _kernel(stride=(1, 3))),
    "padding": ("kernel", _kernel(padding=(2, 2))),
    "dilation": ("kernel", _kernel(dilation=(2, 1))),
}


@pytest.mark.parametrize("name", [SPARSE, STRIDED, DENSE, UP])
@pytest.mark.parametrize("change", CHANGES)
def test_one_change_of_a_convolution_is_said(name: str, change: str) -> None:
    field, new = CHANGES[change]
    expected = [f"{name}: its {field} differs"]
    plan = _plan()
    if change == "bias of -0":
        plan = _with(plan, name, lambda o: replace(o, bias=np.zeros_like(o.bias)))
    other = _with(plan, name, new)
    assert differences(plan, other) == differences(other, plan) == expected


def test_every_field_of_a_convolution_is_changed_above() -> None:
    assert {field for field, _ in CHANGES.values()} == {f.name for f in fields(Convolution)} - {"name"}


def test_one_change_of_a_float_convolution_is_said() -> None:
    plan = _plan()
    other = _with(plan, FLOAT, _changed("weight", 17, step=True))
    assert differences(plan, other) == [f"{FLOAT}: its weight differs"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sources", lambda o: replace(o, sources=o.sources[::-1])),
        ("ranges", lambda o: replace(o, ranges=(_next(o.ranges[0]), o.ranges[1]))),
        ("ranges", lambda o: replace(o, ranges=(o.ranges[0], _next(o.ranges[1])))),
        ("ranges", lambda o: replace(o, ranges=None)),
        ("relu", lambda o: replace(o, relu=not o.relu)),
    ],
)
def test_one_change_of_an_addition_is_said(field: str, change: Callable[[Any], Operation]) -> None:
    plan = _plan()
    other = _with(plan, ADD, change)
    assert differences(plan, other) == differences(other, plan) == [f"{ADD}: its {field} differs"]


@pytest.mark.parametrize("name", ["map_to_bev_module", "backbone_2d.concatenation"])
def test_one_change_of_a_map_is_said(name: str) -> None:
    plan = _plan()
    other = _with(plan, name, lambda o: replace(o, sources=(*o.sources[:-1], "another")))
    assert differences(plan, other) == [f"{name}: its sources differs"]


def test_an_operation_of_another_class_is_said() -> None:
    plan, name = _plan(), "map_to_bev_module"
    other = _with(plan, name, lambda o: Concatenation(o.name, o.sources))
    assert differences(plan, other) == [f"{name} is a HeightMap and a Concatenation"]
    assert isinstance(plan[name], HeightMap)


def test_operations_too_few_or_in_another_order_are_said() -> None:
    plan = _plan()
    for operations in (plan.operations[:-1], plan.operations[1:], plan.operations[::-1]):
        (line,) = differences(plan, replace(plan, operations=operations))
        assert line.startswith("operations are ['backbone_3d.conv_input.0', ")
    renamed = _with(plan, SPARSE, lambda o: replace(o, name="another"))
    (line,) = differences(plan, renamed)
    assert "'another'" in line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_features": 4}, "num_features is 5 and 4"),
        ({"grid": (41, 32, 17)}, "grid is (41, 32, 16) and (41, 32, 17)"),
    ],
)
def test_other_ends_are_said(change: dict[str, Any], line: str) -> None:
    assert differences(_plan(), replace(_plan(), **change)) == [line]


def test_other_outputs_are_said() -> None:
    plan = _plan()
    exchanged = dict(zip(plan.outputs, reversed(plan.outputs.values()), strict=True))
    fewer = dict(list(plan.outputs.items())[1:])
    for outputs in (exchanged, fewer, {**plan.outputs, "more": FEATURES}):
        (line,) = differences(plan, replace(plan, outputs=outputs))
        assert line.startswith("outputs are {'head0.center': ")


def test_several_differences_are_all_said() -> None:
    plan = _plan()
    other = _with(_with(plan, SPARSE, _changed("weight")), DENSE, _changed("bias", step=True))
    other = _with(other, DENSE, lambda o: replace(o, relu=False))
    assert differences(plan, replace(other, num_features=6)) == [
        "num_features is 5 and 6",
        f"{SPARSE}: its weight differs",
        f"{DENSE}: its bias differs",
        f"{DENSE}: its relu differs",
    ]


def test_a_plan_holds_copies_of_the_numbers() -> None:
    network = calibrated("int8")
    plan = plan_of(network)
    before = plan[FLOAT].weight.copy(), plan[DENSE].bias.copy()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert np.array_equal(plan[FLOAT].weight, before[0])
    assert np.array_equal(plan[DENSE].bias, before[1])
    assert SMALL.num_point_features == plan.num_features


def test_unsigned_codes_leave_none_out() -> None:
    """A narrow range has no most negative code; from 0 on there is none to leave out."""
    rule = {"layers": DENSE, "input": {"signed": False, "narrow_range": True}}
    network = new_subject(Scheme.from_dict({"rules": [rule]})).network
    chosen = plan_of(network)[DENSE].input_range
    assert (chosen.smallest, chosen.largest, chosen.format.narrow_range) == (0, 255, False)
