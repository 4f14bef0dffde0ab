"""Every rule of the linter has a model that breaks it and no other; one that breaks none has no finding."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpq_train.export.tensorrt.lint import OPERATORS, RULES, Finding, lint

Change = Callable[[onnx.ModelProto], None]


def _model() -> onnx.ModelProto:
    """x -> quantized 1x1 Conv (3 to 4 channels), Relu, Concat with x, float Conv (7 to 2)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight_codes", "weight_step"], ["weight"], axis=0),
        helper.make_node("Conv", ["values", "weight", "bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        helper.make_node("Concat", ["positive", "x"], ["joined"], axis=1),
        helper.make_node("Conv", ["joined", "float_weight"], ["y"]),
    ]
    numbers = {
        "step": np.float32(0.1),
        "zero": np.int8(0),
        "weight_codes": np.full((4, 3, 1, 1), -128, np.int8),
        "weight_step": np.full(4, 0.1, np.float32),
        "bias": np.zeros(4, np.float32),
        "float_weight": np.ones((2, 7, 1, 1), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "a test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 9])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in numbers.items()],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    return model


def _node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.output[0] == output)


def _reads(output: str, place: int, tensor: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _node(model, output).input[place] = tensor

    return change


def _has(name: str, values: np.ndarray | np.generic) -> Change:
    """Other numbers, of an initializer that is there or a new one."""

    def change(model: onnx.ModelProto) -> None:
        kept = [one for one in model.graph.initializer if one.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(values), name)])

    return change


def _before(
    output: str, operator: str, inputs: list[str], made: str, domain: str = "", **attributes: int
) -> Change:
    """A node more."""

    def change(model: onnx.ModelProto) -> None:
        place = list(model.graph.node).index(_node(model, output))
        nodes = list(model.graph.node)
        nodes.insert(place, helper.make_node(operator, inputs, [made], domain=domain, **attributes))
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return change


def _both(*changes: Change) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for one in changes:
            one(model)

    return change


def _opset(version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _no_zero_point(model: onnx.ModelProto) -> None:
    for name in ("codes", "values"):
        del _node(model, name).input[2]


def _free_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _axis(value: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _node(model, "weight").attribute[0].i = value

    return change


def _transposed(model: onnx.ModelProto) -> None:
    node = _node(model, "y")
    node.op_type = "ConvTranspose"
    node.input[1] = "other_weight"
    _has("other_weight", np.ones((7, 2, 1, 1), np.float32))(model)


def _float_only(model: onnx.ModelProto) -> None:
    del model.graph.node[:-1]
    _has("float_weight", np.ones((2, 3, 1, 1), np.float32))(model)
    model.graph.node[0].input[0] = "x"


def _of_another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("org.other", 1))
    _before("y", "Relu", ["x"], "more", "org.other")(model)


MORE = ("more_steps", "more_zeros")
MORE_STEPS = _has("more_steps", np.full(3, 0.1, np.float32))
MORE_ZEROS = _has("more_zeros", np.zeros(3, np.int8))
HALVES = _has("halves", np.zeros(4, np.float16))

BREAKS: list[tuple[str, Change, list[tuple[str, str]]]] = [
    ("opset", _opset(21), [("opset_import", "opset 21")]),
    ("opset", _both(_float_only, _opset(8)), [("opset_import", "opset 8")]),
    ("operator", _before("y", "Sigmoid", ["x"], "more"), [("more", "operator Sigmoid")]),
    ("operator", _of_another_domain, [("more", "operator org.other Relu")]),
    ("deconvolution", _transposed, [("y", "a ConvTranspose")]),
    ("uint8", _has("zero", np.uint8(0)), [("zero", "UINT8"), ("codes", "UINT8")]),
    ("uint8", _no_zero_point, [("codes", "UINT8")]),
    ("uint8", _has("more", np.zeros(3, np.uint8)), [("more", "UINT8")]),
    ("int8", _before("y", "Identity", ["codes"], "more"), [("more", "Identity of INT8 'codes'")]),
    (
        "int8",
        _before("y", "Concat", ["codes", "weight_codes"], "more", axis=0),
        [("more", "Concat of INT8 'weight_codes'"), ("more", "Concat of INT8 'codes'")],
    ),
    (
        "zero-point",
        _has("zero", np.int8(1)),
        [(name, "a zero point that is no constant of zeros") for name in ("codes", "values")],
    ),
    (
        "zero-point",
        _both(MORE_ZEROS, _before("y", "DequantizeLinear", ["weight_codes", "step", "more_zeros"], "more")),
        [("more", "3 zero points for 1 scales")],
    ),
    *(
        ("scale", _has("weight_step", np.array([0.1, 0.2, 0.3, bad], np.float32)), [("weight", seen)])
        for bad, seen in (
            (0, "scales from 0 to 0.3"),
            (-1, "scales from -1 to 0.3"),
            (1e-39, "scales from 1e-39 to 0.3"),
            (np.inf, "scales from 0.1 to inf"),
            (np.nan, "scales from nan to nan"),
        )
    ),
    ("scale", _has("step", np.float32(0)), [(name, "scales from 0 to 0") for name in ("codes", "values")]),
    (
        "scale",
        _both(
            _before("codes", "Identity", ["step"], "made"),
            _reads("codes", 1, "made"),
            _reads("values", 1, "made"),
        ),
        [(name, "scale 'made' is computed") for name in ("codes", "values")],
    ),
    ("axis", _axis(1), [("weight", "4 scales on axis 1 of [4, 3, 1, 1]")]),
    ("axis", _axis(4), [("weight", "4 scales on axis 4 of [4, 3, 1, 1]")]),
    ("axis", _has("weight_step", np.ones(3, np.float32)), [("weight", "3 scales on axis 0 of [4, 3, 1, 1]")]),
    (
        "axis",
        _both(MORE_STEPS, MORE_ZEROS, _before("y", "QuantizeLinear", ["x", *MORE], "more")),
        [("more", "3 scales of a tensor that is no constant")],
    ),
    (
        "weight",
        _both(_before("sum", "Relu", ["weight"], "changed"), _reads("sum", 1, "changed")),
        [("sum", "its weight 'changed' is neither")],
    ),
    (
        "weight",
        _both(_before("y", "Identity", ["float_weight"], "changed"), _reads("y", 1, "changed")),
        [("y", "its weight 'changed' is neither")],
    ),
    (
        "pair",
        _reads("sum", 0, "x"),
        [("sum", "INT8 weights and the input 'x', which no DequantizeLinear makes")],
    ),
    (
        "pair",
        _both(_has("other_weight", np.ones((2, 3, 1, 1), np.float32)), _reads("y", 1, "other_weight"),
              _reads("y", 0, "values")),
        [("y", "float weights and a quantized input")],
    ),
    (
        "pair",
        _both(_has("other", np.float32(0.2)), _reads("values", 1, "other")),
        [("values", "no QuantizeLinear of the same scale makes its codes")],
    ),
    ("bias", _has("bias", np.zeros(4, np.int32)), [("sum", "bias 'bias' of INT32 [4]")]),
    ("bias", _has("bias", np.zeros(3, np.float32)), [("sum", "bias 'bias' of FLOAT [3]")]),
    ("bias", _has("bias", np.zeros((1, 4), np.float32)), [("sum", "bias 'bias' of FLOAT [1, 4]")]),
    (
        "bias",
        _both(_before("sum", "Identity", ["bias"], "made"), _reads("sum", 2, "made")),
        [("sum", "bias 'made' of FLOAT [4]")],
    ),
    ("type", _both(HALVES, _reads("sum", 2, "halves")), [("sum", "Conv of FLOAT and FLOAT16")]),
    ("type", _has("float_weight", np.ones((2, 7, 1, 1), np.float16)), [("y", "Conv of FLOAT and FLOAT16")]),
    (
        "type",
        _both(_has("half", np.float16(0.1)), _before("y", "QuantizeLinear", ["x", "half", "zero"], "more")),
        [("more", "QuantizeLinear of FLOAT and FLOAT16")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "seen"), BREAKS)
def test_a_model_that_breaks_one_rule(rule: str, change: Change, seen: list[tuple[str, str]]) -> None:
    model = _model()
    change(model)
    assert lint(model) == [Finding(rule, *one) for one in seen]


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("Unique", ["x"]),
        ("Compress", ["x", "those"]),
        ("MatMulInteger", ["weight_codes", "weight_codes"]),
        ("ConvInteger", ["codes", "weight_codes"]),
        ("QLinearConv", ["codes", *["step", "zero"], "weight_codes", *["step", "zero"] * 2]),
    ],
)
def test_operators_that_break_other_rules_too(operator: str, inputs: list[str]) -> None:
    model = _model()
    _both(_has("those", np.ones(1, bool)), _before("y", operator, inputs, "more"))(model)
    assert Finding("operator", "more", f"operator {operator}") in lint(model)


def test_free_sizes() -> None:
    model = _model()
    _free_batch(model)
    findings = lint(model)
    assert {finding.rule for finding in findings} == {"shape"}
    assert findings[0] == ("shape", "x", "shape [?, 3, 8, 9]")


def test_no_size_at_all() -> None:
    model = _model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert lint(model)[0] == ("shape", "x", "shape [?]")


def test_a_model_that_breaks_no_rule() -> None:
    onnx.checker.check_model(_model(), full_check=True)
    assert lint(_model()) == []


def test_every_rule_is_broken_by_a_model() -> None:
    assert {rule for rule, _, _ in BREAKS} | {"shape"} == set(RULES)


def test_every_rule_says_where_it_is_written() -> None:
    for rule in RULES.values():
        assert len(rule.source) > 20
    assert len({rule.sentence for rule in RULES.values()}) == len(RULES)
    assert "ConvTranspose" not in OPERATORS


def test_a_finding_is_a_sentence() -> None:
    finding = Finding("scale", "codes", "scales from 0 to 0")
    assert str(finding) == (
        "codes: scales from 0 to 0 (scale: scales are constants, positive, finite and normal numbers)"
    )
