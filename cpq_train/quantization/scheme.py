"""What to quantize how: a YAML file of defaults and an ordered list of rules, resolved against a network.

    name: int8
    share_residual: true                      # one range for a residual block's input and its add
    on_unfit_range: error                     # or float: leave layers in float whose range comes out unfit
    on_small_step: error                      # or widen: the weight's range, where a bias has no code
    on_reuse: error                           # or one_range: for a layer used on tensors of different ranges
    tensorrt_conv_transpose: false            # true: ConvTranspose2d weights per input channel (axis 0)
    defaults:
      weight: {bits: 8, granularity: per_channel, method: max}
      input: {bits: 8, granularity: per_tensor, method: mse}
      bias: accumulator                       # whole multiples of step_x * step_w; or float, or fp16
    rules:                                    # later rules win
      - layers: "backbone_3d.conv_input.*"    # glob over module names
        weight: off
        input: off

`bias` is float where it is not set. Only a layer with an integer sum, and a static input range that gives it
a step, has an accumulator bias.

`kinds` restricts a rule to some of the kinds of layer (`KINDS`). A quantizer's settings are the fields of
`QuantizerScheme`; `off` is short for `{mode: off}`. The types of the fields are what a file is checked
against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from cpq_train.common.documents import parse_yaml, read_text
from cpq_train.common.errors import UserError, shown
from cpq_train.common.schema import Flag, accepts, known_keys, validated
from cpq_train.quantization.numerics.biases import BiasKind
from cpq_train.quantization.numerics.formats import Float8Format, IntegerFormat, NumberFormat

SparseKind = Literal["SubMConv3d", "SparseConv3d", "SparseInverseConv3d"]
DenseKind = Literal["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"]
Kind = Literal[SparseKind, DenseKind, "ResidualAdd"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of layer that can be quantized."""

OUTPUT_CHANNEL_AXIS = {str(kind): int(kind == "ConvTranspose2d") for kind in KINDS if kind != "ResidualAdd"}
"""Axis of the output channels in a weight: spconv 2 stores KRSC; ConvTranspose2d stores (in, out, kH, kW)."""

CONV_TRANSPOSE_INPUT_AXIS = 0
"""Where older TensorRT releases, and pytorch-quantization's default, put the scales of a ConvTranspose2d."""

Bits = Annotated[int, Field(strict=True, ge=2, le=16), accepts("whole numbers from 2 to 16")]
Percent = Annotated[float, Field(strict=True, gt=0, le=100), accepts("above 0, up to 100")]


@dataclass(frozen=True)
class QuantizerScheme:
    """How one tensor is quantized.

    Args:
        format: int, or fp8_e4m3 (8 bits, signed; its arithmetic is simulated).
        bits: 2 to 16.
        signed: Two's complement or non-negative codes (an input behind a ReLU).
        narrow_range: Leave out the most negative code, as an engine with a symmetric range does.
        granularity: One amax per tensor, or one per output channel (weights only).
        method: How amax is found: max or mse; for inputs also percentile, entropy, foreground (the range with
            the least error at the detector's foreground cells).
        mode: static (amax found by calibration), dynamic (max of each tensor), off (stays float).
        percentile: Share of the values kept inside amax, in percent, for `method: percentile`.
        count_zeros: Whether zeros take part in a percentile. A BEV map is mostly zeros, which
            say nothing about the range.

    Raises:
        UserError: The settings contradict one another.
    """

    format: Literal["int", "fp8_e4m3"] = "int"
    bits: Bits = 8
    signed: Flag = True
    narrow_range: Flag = False
    granularity: Literal["per_tensor", "per_channel"] = "per_tensor"
    method: Literal["max", "percentile", "mse", "entropy", "foreground"] = "max"
    mode: Literal["static", "dynamic", "off"] = "static"
    percentile: Percent = 99.99
    count_zeros: Flag = False

    def __post_init__(self) -> None:
        if self.format == "fp8_e4m3" and (self.bits != 8 or not self.signed or self.narrow_range):
            raise UserError(f"format fp8_e4m3 has 8 bits, signed, and no narrow_range; got {self!r}")

    @property
    def number_format(self) -> NumberFormat:
        """The numbers in use."""
        if self.format == "fp8_e4m3":
            return Float8Format()
        return IntegerFormat(self.bits, self.signed, self.narrow_range)

    @property
    def is_off(self) -> bool:
        """Whether the tensor stays float."""
        return self.mode == "off"


@dataclass(frozen=True)
class WeightScheme(QuantizerScheme):
    """What a scheme can ask for weights."""

    signed: Annotated[Literal[True], accepts("true (weights have both signs)")] = True
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    method: Literal["max", "mse"] = "max"


@dataclass(frozen=True)
class InputScheme(QuantizerScheme):
    """What a scheme can ask for inputs."""

    granularity: Literal["per_tensor"] = "per_tensor"


@dataclass(frozen=True)
class LayerScheme:
    """The resolved choice for one layer; `weight` is off for a residual add.

    Args:
        weight: How the weight is quantized.
        input: How the input is quantized.
        has_weight: Whether there is one; a residual add has none.
        scales_input_channels: Whether weight ranges belong to input channels (`tensorrt_conv_transpose`): a
            scale then sits on a summed index and cannot leave the sum.
        why_float: Why nothing is quantized: the rule, or the defaults, that turned it off.
        bias: What the bias is in the layer's arithmetic.
        widens_steps: Whether steps that are too small for a bias are made larger.
    """

    weight: QuantizerScheme
    input: QuantizerScheme
    has_weight: bool = True
    scales_input_channels: bool = False
    why_float: str = ""
    bias: BiasKind = "float"
    widens_steps: bool = False

    def weight_axis(self, kind: str) -> int | None:
        """Axis of the weight whose channels have a range each; None for one range, or without a weight."""
        if self.weight.is_off or self.weight.granularity == "per_tensor":
            return None
        return CONV_TRANSPOSE_INPUT_AXIS if self.scales_input_channels else OUTPUT_CHANNEL_AXIS[kind]

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weight.is_off and self.input.is_off

    @property
    def arithmetic(self) -> str:
        """What stands behind the layer's output.

        `integer`: a sum of integer products times a scale. `simulated`: the float layer on rounded values
        (FP8, one of weight and input in float, or a scale on a summed index). `float`: nothing is rounded.
        """
        return "float" if self.is_float else "simulated" if self.why_simulated else "integer"

    @property
    def why_simulated(self) -> str:
        """Why no integer sum stands behind the layer; empty where one does."""
        if self.input.is_off:
            return "its input is not quantized"
        if self.has_weight and self.weight.is_off:
            return "its weight is not quantized"
        if "fp8_e4m3" in (self.input.format, self.has_weight and self.weight.format):
            return "FP8 numbers are no integers"
        return "weight scales sit on the summed channels (axis 0)" if self.scales_input_channels else ""


def _settings(value: Any) -> Any:
    """`off` (which YAML reads as False) stands for {mode: off}."""
    settings = {"mode": value} if value is False or value == "off" else value
    if not isinstance(settings, Mapping):
        raise UserError(f"got {shown(value)}, accepted: a mapping, or off")
    return {**settings, "mode": "off"} if settings.get("mode") is False else settings


def _kinds(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise UserError(f"got {shown(value)}, accepted: a list of {', '.join(KINDS)}")
    return value


ForWeights = Annotated[WeightScheme, known_keys(WeightScheme), BeforeValidator(_settings)]
ForInputs = Annotated[InputScheme, known_keys(InputScheme), BeforeValidator(_settings)]


class _SomeOf:
    """For `Annotated`: settings that are checked as those of a quantizer, and stay the few that they are."""

    def __init__(self, quantizer: Any) -> None:
        self._quantizer = quantizer

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, complete: core_schema.ValidatorFunctionWrapHandler) -> Any:
            complete(value)
            return _settings(value)

        whole = handler.generate_schema(self._quantizer)
        return core_schema.no_info_wrap_validator_function(check, whole)


@dataclass(frozen=True)
class Rule:
    """One entry of `rules`: which layers, and what it sets for their weights, inputs and biases."""

    layers: str
    kinds: Annotated[tuple[Kind, ...], BeforeValidator(_kinds)] = KINDS
    weight: Annotated[Mapping[str, Any], _SomeOf(ForWeights)] = field(default_factory=dict)
    input: Annotated[Mapping[str, Any], _SomeOf(ForInputs)] = field(default_factory=dict)
    bias: BiasKind | None = None

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule speaks of the layer `name` of kind `kind`."""
        return kind in self.kinds and fnmatchcase(name, self.layers)


@dataclass(frozen=True)
class Defaults:
    """What counts where no rule says something else."""

    weight: ForWeights = WeightScheme()
    input: ForInputs = InputScheme()
    bias: BiasKind = "float"


@dataclass(frozen=True)
class Scheme:
    """A whole quantization scheme; see the module docstring for the file format."""

    name: str = "unnamed"
    share_residual: Flag = True
    on_unfit_range: Literal["error", "float"] = "error"
    on_small_step: Literal["error", "widen"] = "error"
    on_reuse: Literal["error", "one_range"] = "error"
    tensorrt_conv_transpose: Flag = False
    defaults: Annotated[Defaults, known_keys(Defaults)] = Defaults()
    rules: tuple[Annotated[Rule, known_keys(Rule)], ...] = ()

    @classmethod
    def from_file(cls, path: str | Path) -> Scheme:
        """Read a YAML file.

        Raises:
            UserError: The file is missing, is cut or no YAML, or holds unknown keys or values.
        """
        text, where = read_text(Path(path), "scheme file"), f"scheme file {str(path)!r}"
        if not text.endswith("\n"):
            raise UserError(f"{where} ends within a line, as one that was cut; accepted: whole lines")
        scheme = cls.from_dict(parse_yaml(text, where), where)
        for number, rule in enumerate(scheme.rules, 1):
            if not (rule.weight or rule.input or rule.bias):
                raise UserError(f"{where}, rule {number} sets nothing; accepted: weight, input, bias")
        return scheme

    @classmethod
    def from_dict(cls, content: Any, where: str = "scheme") -> Scheme:
        """Build from what `to_dict` returns or a YAML file holds."""
        return validated(_SCHEME, content, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal scheme."""
        rules = [{**asdict(rule), "kinds": list(rule.kinds)} for rule in self.rules]
        for rule in rules:
            if rule["bias"] is None:
                del rule["bias"]
            if rule["kinds"] == list(KINDS):
                del rule["kinds"]
        return {**asdict(self), "rules": rules}

    def with_float(self, names: Iterable[str]) -> Scheme:
        """The scheme with a rule more for each of these layers, which leaves it in float."""
        off = {"mode": "off"}
        return replace(self, rules=self.rules + tuple(Rule(name, weight=off, input=off) for name in names))

    def resolve(self, layers: Mapping[str, str]) -> dict[str, LayerScheme]:
        """Decide for every layer.

        Args:
            layers: Module name -> kind.

        Returns:
            Module name -> its scheme, float ones included.

        Raises:
            UserError: A rule matches no layer, or nothing at all would be quantized.
        """
        for number, rule in enumerate(self.rules, 1):
            if not any(rule.matches(name, kind) for name, kind in layers.items()):
                raise UserError(
                    f"scheme {self.name!r}, rule {number}: layers {rule.layers!r}, kinds {list(rule.kinds)} "
                    "matches no layer; "
                    f"names look like {', '.join(list(layers)[:3])}"
                )
        resolved = {name: self._resolve_layer(name, kind) for name, kind in layers.items()}
        if all(layer.is_float for layer in resolved.values()):
            raise UserError(
                f"scheme {self.name!r} leaves all {len(layers)} layers in float: nothing to quantize"
            )
        return resolved

    def _resolve_layer(self, name: str, kind: str) -> LayerScheme:
        weight: QuantizerScheme = self.defaults.weight
        input_, bias, why_float = self.defaults.input, self.defaults.bias, "the defaults"
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(name, kind):
                where = f"scheme {self.name!r}, rule {number}"
                weight = _override(weight, rule.weight, f"{where}, weight")
                input_ = _override(input_, rule.input, f"{where}, input")
                bias = rule.bias or bias
                if rule.weight or rule.input:
                    why_float = f"rule {number} ({rule.layers})"
        if kind == "ResidualAdd":
            layer = LayerScheme(replace(weight, mode="off"), input_, has_weight=False)
        else:
            on_inputs = self.tensorrt_conv_transpose and kind == "ConvTranspose2d"
            per_channel = weight.granularity == "per_channel"
            layer = LayerScheme(weight, input_, scales_input_channels=on_inputs and per_channel)
        if layer.is_float:
            return replace(layer, why_float=why_float)
        is_known = not layer.why_simulated and layer.input.mode == "static"  # the step of the sum, beforehand
        if not layer.has_weight or (bias == "accumulator" and not is_known):
            return layer
        return replace(layer, bias=bias, widens_steps=self.on_small_step == "widen")


_SCHEME: TypeAdapter[Scheme] = TypeAdapter(Annotated[Scheme, known_keys(Scheme)])

Q = TypeVar("Q", bound=QuantizerScheme)


def _override(base: Q, settings: Mapping[str, Any], where: str) -> Q:
    try:
        return replace(base, **settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
