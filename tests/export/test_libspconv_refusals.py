"""What libspconv cannot say is refused by layer, with what to do instead."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exported_networks import A8, CONV_INPUT, W8, new_subject
from exported_networks import subject_of as portable_subject_of
from libspconv_files import DENSE, FIRST_BLOCK, SCHEMES, sparse_plan, subject_of, with_changed, writable

from cpq_train.common.errors import UserError
from cpq_train.export.libspconv.arithmetic import codes_of, half_weight, in_half_precision
from cpq_train.export.libspconv.refusals import why_not
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.plan import Addition, Convolution, InputRange, Plan
from cpq_train.export.planning import plan_of, refuse
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.scheme import Scheme

FIRST = "backbone_3d.conv_input.0"
INTEGER = "backbone_3d.conv2.0.0"
FLOAT = "backbone_3d.conv1.0.conv2"
BLOCK = "backbone_3d.conv2.1"

TWO_RANGES = (
    "what it reads has two ranges, and the engine keeps one: set `share_residual: true`, and the same "
    "`input` for all that read it"
)
TWO_TYPES = (
    "what it reads is read as int8 by some layers and as fp16 by others, and is one of them: quantize all of "
    "these layers or none"
)


def _with_scheme(*rules: dict[str, Any], **further: Any) -> dict[str, str]:
    content = {"defaults": {"weight": W8, "input": A8}, "rules": [CONV_INPUT, *rules], **further}
    return why_not(writable(new_subject(Scheme.from_dict(content))))


def _with_weight(*codes_and_steps: tuple[int, float]) -> dict[str, str]:
    """The reasons where the first channels of an integer layer have one other code and step each."""
    layer = sparse_plan("nvidia")[INTEGER]
    weight, step = layer.weight.copy(), layer.weight_step.copy()
    for channel, (code, value) in enumerate(codes_and_steps):
        weight[channel].flat[0], step[channel] = code, value
    return why_not(with_changed(sparse_plan("nvidia"), INTEGER, weight=weight, weight_step=step))


def _with_ranges(changed: InputRange) -> Plan:
    """A plan with an add and a convolution, in different blocks, that read as said."""
    plan = sparse_plan("nvidia")
    operations = []
    for one in plan.operations:
        if one.name == f"{BLOCK}.conv2":
            operations.append(replace(one, input_range=changed))
        elif one.name == f"{BLOCK}.quant_add":
            operations.append(replace(one, ranges=(changed, one.ranges[1])))
        else:
            operations.append(one)
    return replace(plan, operations=tuple(operations))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_can_be_written_has_no_reason(scheme: str) -> None:
    assert why_not(sparse_plan(scheme)) == {}


# Biases


def test_biases_in_fp32() -> None:
    plan = in_half_precision(plan_of(subject_of("nvidia").network, "sparse"))
    integer = [one.name for one in plan.operations if getattr(one, "weight_step", None) is not None]
    reason = "its bias is fp32: set `bias: fp16` in the scheme, or --snap_biases"
    assert why_not(plan) == dict.fromkeys(integer, reason)
    assert INTEGER in integer
    assert FLOAT not in integer


def test_a_bias_on_the_grid_of_the_sum() -> None:
    plan = with_changed(
        sparse_plan("nvidia"), INTEGER, bias=lambda layer: np.zeros(len(layer.weight), np.int32)
    )
    assert why_not(plan) == {INTEGER: "its bias is int32: set `bias: fp16` in the scheme, or --snap_biases"}


def test_no_bias() -> None:
    plan = with_changed(sparse_plan("nvidia"), INTEGER, FLOAT, bias=None)
    reason = "it has no bias, and every layer of the engine has one: give it zeros"
    assert why_not(plan) == {INTEGER: reason, FLOAT: reason}


@pytest.mark.parametrize("name", [INTEGER, FLOAT])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_bias_beyond_fp16(name: str, value: float) -> None:
    bias = sparse_plan("nvidia")[name].bias.copy()
    bias[3] = value
    reason = "its bias passes 65504, where fp16 ends: scale it down"
    assert why_not(with_changed(sparse_plan("nvidia"), name, bias=bias)) == {name: reason}


def test_a_bias_of_a_float_layer_that_fp16_does_not_hold() -> None:
    plan = plan_of(subject_of("nvidia").network, "sparse")
    bias = np.full(len(plan[FIRST].weight), 65520, np.float32)
    found = why_not(in_half_precision(with_changed(plan, FIRST, bias=bias)))
    assert found[FIRST] == "its bias passes 65504, where fp16 ends: scale it down"


# Weights


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_a_float_weight_beyond_fp16(value: float) -> None:
    plan = plan_of(subject_of("float").network, "sparse")
    weight = plan[INTEGER].weight.copy()
    weight.flat[5] = value
    found = why_not(in_half_precision(with_changed(plan, INTEGER, weight=weight)))
    assert found == {INTEGER: "its weight passes 65504, where fp16 ends: quantize it"}


def test_a_float_weight_that_is_not_in_half_precision() -> None:
    plan = with_changed(sparse_plan("nvidia"), FLOAT, weight=lambda layer: layer.weight.astype(np.float32))
    assert why_not(plan) == {FLOAT: "its weight is float32: the engine's is fp16"}


def test_an_integer_weight_beyond_fp16() -> None:
    step = float(np.float32(66000) / np.float32(127))
    assert _with_weight((127, step)) == {INTEGER: "its weight passes 65504, where fp16 ends: scale it down"}


def test_an_integer_weight_at_the_end_of_fp16() -> None:
    layer = sparse_plan("nvidia")[INTEGER]
    weight, step = layer.weight.copy(), layer.weight_step.copy()
    weight[0], step[0] = 127, np.float32(65500) / np.float32(127)
    assert why_not(with_changed(sparse_plan("nvidia"), INTEGER, weight=weight, weight_step=step)) == {}


def test_steps_so_small_that_fp16_loses_codes() -> None:
    """Between fp16's smallest numbers lies 2^-24."""
    (reason,) = _with_weight((5, 2.0**-25)).values()
    assert "codes of its weight would be others, rounded to fp16 with steps down to 2.98023e-08" in reason


def test_small_steps_whose_codes_survive() -> None:
    for exponent in range(-24, -14):
        step = np.array([2.0**exponent], np.float32)
        codes = np.arange(-128, 128, dtype=np.int8)[None]
        assert np.array_equal(codes_of(half_weight(codes, step), step), codes), exponent


@pytest.mark.parametrize("step", [0.0, 2.0**-130, np.inf, np.nan, -1.0])
@pytest.mark.parametrize("code", [0, 1])
def test_steps_that_are_no_normal_numbers(step: float, code: int) -> None:
    layer = sparse_plan("nvidia")[INTEGER]
    weight, steps = layer.weight.copy(), layer.weight_step.copy()
    weight[0], steps[0] = code, step
    found = why_not(with_changed(sparse_plan("nvidia"), INTEGER, weight=weight, weight_step=steps))
    assert list(found) == [INTEGER]
    assert found[INTEGER].endswith("no normal fp32 number: leave it in float")


def test_weights_of_4_bits_whose_steps_no_range_gives() -> None:
    found = _with_scheme({"layers": "*", "weight": {"bits": 4}})
    assert found
    for name, reason in found.items():
        assert name.startswith("backbone_3d.")
        assert reason.endswith(" steps of its weight are no fp32 range / 127: set `bits: 8` for its weight")


# Inputs


def test_voxels_read_as_codes() -> None:
    plan = writable(portable_subject_of("whole"))
    reason = "it reads the voxels, which enter in fp16: set `weight: off` and `input: off` for it"
    assert why_not(plan) == {FIRST: reason}


def test_unsigned_codes() -> None:
    found = _with_scheme({"layers": INTEGER, "input": {"signed": False}})
    assert found[INTEGER] == "its input has unsigned codes, 0 to 255: set `signed: true` for it"


@pytest.mark.parametrize("bits", [4, 7, 9, 16])
def test_other_widths(bits: int) -> None:
    reason = f"its input has {bits} bits: set `bits: 8` for it"
    found = why_not(_with_ranges(InputRange(1.0, IntegerFormat(bits))))
    assert found == {f"{BLOCK}.conv2": reason, f"{BLOCK}.quant_add": reason}


@pytest.mark.parametrize("bits", [4, 8])
def test_unsigned_inputs_of_any_width(bits: int) -> None:
    reason = f"its input has unsigned codes, 0 to {2**bits - 1}: set `signed: true` for it"
    found = why_not(_with_ranges(InputRange(1.0, IntegerFormat(bits, signed=False))))
    assert found == {f"{BLOCK}.conv2": reason, f"{BLOCK}.quant_add": reason}


def test_narrow_inputs() -> None:
    reason = "its input leaves out code -128: set `narrow_range: false` for it"
    found = why_not(_with_ranges(InputRange(1.0, IntegerFormat(8, narrow_range=True))))
    assert found == {f"{BLOCK}.conv2": reason, f"{BLOCK}.quant_add": reason}


def test_the_second_range_of_an_add() -> None:
    plan = sparse_plan("nvidia")
    add = plan[f"{BLOCK}.quant_add"]
    other = InputRange(add.ranges[1].amax, IntegerFormat(8, signed=False))
    changed = with_changed(plan, add.name, ranges=(add.ranges[0], other))
    assert why_not(changed)[add.name] == "its input has unsigned codes, 0 to 255: set `signed: true` for it"


# Tensors with several readers


ADDS_BY_MSE = {"layers": "*", "kinds": ["ResidualAdd"], "input": {"method": "mse"}}


def test_two_ranges_of_one_tensor() -> None:
    found = _with_scheme(DENSE, ADDS_BY_MSE, FIRST_BLOCK, share_residual=False)
    blocks = [f"backbone_3d.{stage}.1" for stage in ("conv1", "conv2", "conv3", "conv4")]
    assert found == {f"{block}.{layer}": TWO_RANGES for block in blocks for layer in ("conv1", "quant_add")}


def test_a_shared_residual_whose_readers_are_set_otherwise() -> None:
    """Only equal settings share a range, so `share_residual` alone does not do."""
    assert set(_with_scheme(ADDS_BY_MSE).values()) == {TWO_RANGES}


def test_ranges_that_came_out_equal_are_one() -> None:
    """Here the largest number of every add is one of its identity."""
    assert _with_scheme(DENSE, FIRST_BLOCK, share_residual=False) == {}


def test_nvidias_scheme_has_two_ranges_of_its_adds() -> None:
    plan = writable(new_subject(Scheme.from_file("configs/schemes/nvidia_sparse.yaml")))
    assert set(why_not(plan).values()) == {TWO_RANGES}


@pytest.mark.parametrize("layer", ["conv1", "quant_add"])
def test_a_tensor_that_is_read_as_int8_and_as_fp16(layer: str) -> None:
    rule = {"layers": f"{BLOCK}.{layer}", "weight": "off", "input": "off"}
    found = _with_scheme(rule)
    assert {name: found[name] for name in (f"{BLOCK}.conv1", f"{BLOCK}.quant_add")} == {
        f"{BLOCK}.conv1": TWO_TYPES,
        f"{BLOCK}.quant_add": TWO_TYPES,
    }


def test_an_add_of_codes_in_front_of_a_float_layer() -> None:
    found = _with_scheme({"layers": INTEGER, "weight": "off", "input": "off"})
    reason = "it adds int8 and gives fp16, which the engine may not do: quantize what reads it"
    assert found == {"backbone_3d.conv1.1.quant_add": reason}


# Parts


def test_layers_on_maps() -> None:
    plan = plan_of(portable_subject_of("int8").network)
    found = why_not(in_half_precision(plan))
    on_maps = [one.name for one in plan.operations if not _works_on_voxels(one)]
    reason = "works on maps, and this target holds what works on voxels alone"
    assert [name for name, given in found.items() if given == reason] == on_maps
    assert "dense_head.shared_conv.0" in on_maps
    assert "backbone_2d.concatenation" in on_maps


def _works_on_voxels(operation: Any) -> bool:
    is_on_maps = isinstance(operation, Convolution) and not operation.is_sparse
    return not is_on_maps and type(operation).__name__ != "Concatenation"


def test_reasons_are_told_by_layer() -> None:
    with pytest.raises(UserError) as error:
        refuse(why_not(with_changed(sparse_plan("nvidia"), INTEGER, f"{BLOCK}.conv2", bias=None)))
    assert str(error.value) == (
        "2 layers cannot be exported:\n"
        f"  it has no bias, and every layer of the engine has one: give it zeros: {INTEGER}, {BLOCK}.conv2"
    )


def test_a_tensor_with_the_name_of_numbers() -> None:
    """The open rewrite finds weights and biases by their names."""
    plan = replace(sparse_plan("nvidia"), source="weighted_features")
    operations = (replace(plan.operations[0], source="weighted_features"), *plan.operations[1:])
    with pytest.raises(
        UserError, match="'weighted_features' has the name of a weight; expected that of a tensor"
    ):
        model_of(replace(plan, operations=operations), "0", "")


def test_an_add_in_float_has_no_reason_of_its_own() -> None:
    plan = sparse_plan("float")
    assert all(one.ranges is None for one in plan.operations if isinstance(one, Addition))
    assert why_not(plan) == {}
