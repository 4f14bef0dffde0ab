"""What to quantize how: a YAML file of defaults and an ordered list of rules, resolved against a network.

    name: int8
    share_residual: true                      # one range for a residual block's input and its add
    on_unfit_range: error                     # or float: leave layers in float whose range comes out unfit
    tensorrt_conv_transpose: false            # true: ConvTranspose2d weights per input channel (axis 0)
    defaults:
      weight: {bits: 8, granularity: per_channel, method: max}
      input: {bits: 8, granularity: per_tensor, method: mse}
    rules:                                    # later rules win
      - layers: "backbone_3d.conv_input.*"    # glob over module names
        weight: off
        input: off

`kinds` restricts a rule to kinds of layer (`Conv2d`, `ConvTranspose2d`, `SubMConv3d`, `SparseConv3d`,
`ResidualAdd`). A quantizer's settings are the fields of `QuantizerScheme`; `off` is short for `{mode: off}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from cpq_train.common.errors import UserError
from cpq_train.quantization.numerics.formats import Float8Format, IntegerFormat, NumberFormat

KINDS = ("SubMConv3d", "SparseConv3d", "Conv2d", "ConvTranspose2d", "ResidualAdd")
"""The kinds of layer that can be quantized."""

OUTPUT_CHANNEL_AXIS = {"SubMConv3d": 0, "SparseConv3d": 0, "Conv2d": 0, "ConvTranspose2d": 1}
"""Axis of the output channels in a weight: spconv 2 stores KRSC; ConvTranspose2d stores (in, out, kH, kW)."""

CONV_TRANSPOSE_INPUT_AXIS = 0
"""Where older TensorRT releases, and pytorch-quantization's default, put the scales of a ConvTranspose2d."""

INPUT_METHODS = ("max", "percentile", "mse", "entropy", "foreground")
FORMATS = ("int", "fp8_e4m3")
WEIGHT_METHODS = ("max", "mse")
GRANULARITIES = ("per_tensor", "per_channel")
MODES = ("static", "dynamic", "off")


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
        count_zeros: Whether zeros take part in percentile and entropy. A BEV map is mostly zeros, which
            say nothing about the range.
    """

    format: str = "int"
    bits: int = 8
    signed: bool = True
    narrow_range: bool = False
    granularity: str = "per_tensor"
    method: str = "max"
    mode: str = "static"
    percentile: float = 99.99
    count_zeros: bool = False

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
class LayerScheme:
    """The resolved choice for one layer; `weight` is off for a residual add.

    Args:
        weight: How the weight is quantized.
        input: How the input is quantized.
        has_weight: Whether there is one; a residual add has none.
        scales_input_channels: Whether weight ranges belong to input channels (`tensorrt_conv_transpose`): a
            scale then sits on a summed index and cannot leave the sum.
        why_float: Why nothing is quantized: the rule, or the defaults, that turned it off.
    """

    weight: QuantizerScheme
    input: QuantizerScheme
    has_weight: bool = True
    scales_input_channels: bool = False
    why_float: str = ""

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


@dataclass(frozen=True)
class Rule:
    """One entry of `rules`: which layers, and what it sets for their weights and inputs."""

    layers: str
    kinds: tuple[str, ...] = KINDS
    weight: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule speaks of the layer `name` of kind `kind`."""
        return kind in self.kinds and fnmatchcase(name, self.layers)


@dataclass(frozen=True)
class Scheme:
    """A whole quantization scheme; see the module docstring for the file format."""

    name: str
    weight: QuantizerScheme
    input: QuantizerScheme
    rules: tuple[Rule, ...] = ()
    share_residual: bool = True
    on_unfit_range: str = "error"
    tensorrt_conv_transpose: bool = False

    @classmethod
    def from_file(cls, path: str | Path) -> Scheme:
        """Read a YAML file.

        Raises:
            UserError: The file is missing, is no YAML, or holds unknown keys or values.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"scheme file {str(path)!r} does not exist")
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"scheme file {str(path)!r} is no YAML: {error}") from error
        return cls.from_dict(content, where=f"scheme file {str(path)!r}")

    @classmethod
    def from_dict(cls, content: Any, where: str = "scheme") -> Scheme:
        """Build from what `to_dict` returns or a YAML file holds."""
        _check_keys(content, _KEYS, where)
        defaults = content.get("defaults", {})
        _check_keys(defaults, {"weight", "input"}, f"{where}, defaults")
        weight = QuantizerScheme(granularity="per_channel")
        rules = [_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(content.get("rules") or [])]
        on_unfit_range = content.get("on_unfit_range", "error")
        _one_of(on_unfit_range, ("error", "float"), f"{where}, on_unfit_range")
        return cls(
            name=str(content.get("name", "unnamed")),
            weight=_override(weight, defaults.get("weight", {}), "weight", f"{where}, defaults"),
            input=_override(QuantizerScheme(), defaults.get("input", {}), "input", f"{where}, defaults"),
            rules=tuple(rules),
            share_residual=bool(content.get("share_residual", True)),
            on_unfit_range=on_unfit_range,
            tensorrt_conv_transpose=bool(content.get("tensorrt_conv_transpose", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal scheme."""
        return {
            "name": self.name,
            "share_residual": self.share_residual,
            "on_unfit_range": self.on_unfit_range,
            "tensorrt_conv_transpose": self.tensorrt_conv_transpose,
            "defaults": {"weight": asdict(self.weight), "input": asdict(self.input)},
            "rules": [
                {"layers": r.layers, "kinds": list(r.kinds), "weight": dict(r.weight), "input": dict(r.input)}
                for r in self.rules
            ],
        }

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
        weight, input_, why_float = self.weight, self.input, "the defaults"
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(name, kind):
                where = f"scheme {self.name!r}, rule {number}"
                weight = _override(weight, rule.weight, "weight", where)
                input_ = _override(input_, rule.input, "input", where)
                why_float = f"rule {number} ({rule.layers})"
        if kind == "ResidualAdd":
            layer = LayerScheme(replace(weight, mode="off"), input_, has_weight=False)
        else:
            on_inputs = self.tensorrt_conv_transpose and kind == "ConvTranspose2d"
            per_channel = weight.granularity == "per_channel"
            layer = LayerScheme(weight, input_, scales_input_channels=on_inputs and per_channel)
        return replace(layer, why_float=why_float) if layer.is_float else layer


_KEYS = (
    *("name", "defaults", "rules"),
    *("share_residual", "on_unfit_range", "tensorrt_conv_transpose"),
)


def _check_keys(content: Any, accepted: Iterable[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: expected a mapping, got {content!r}")
    unknown = sorted(set(map(str, content)) - set(accepted))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; accepted: {', '.join(sorted(accepted))}")


def _rule(content: Any, where: str) -> Rule:
    _check_keys(content, {"layers", "kinds", "weight", "input"}, where)
    if "layers" not in content:
        raise UserError(f"{where}: needs 'layers', a glob over module names")
    kinds = tuple(content.get("kinds", KINDS))
    for kind in kinds:
        _one_of(kind, KINDS, f"{where}, kinds")
    return Rule(
        str(content["layers"]),
        kinds,
        _settings(content.get("weight", {})),
        _settings(content.get("input", {})),
    )


def _settings(value: Any) -> Mapping[str, Any]:
    """`off` (which YAML reads as False) stands for {mode: off}."""
    return {"mode": "off"} if value in ("off", False) else value


def _override(base: QuantizerScheme, settings: Any, role: str, where: str) -> QuantizerScheme:
    settings = dict(_settings(settings))
    where = f"{where}, {role}"
    _check_keys(settings, [f.name for f in fields(QuantizerScheme)], where)
    if settings.get("mode") is False:
        settings["mode"] = "off"
    result = replace(base, **settings)
    _check(result, role, where)
    return result


def _check(scheme: QuantizerScheme, role: str, where: str) -> None:
    is_weight = role == "weight"
    _one_of(scheme.format, FORMATS, f"{where}, format")
    _one_of(scheme.mode, MODES, f"{where}, mode")
    _one_of(scheme.granularity, GRANULARITIES if is_weight else ("per_tensor",), f"{where}, granularity")
    _one_of(scheme.method, WEIGHT_METHODS if is_weight else INPUT_METHODS, f"{where}, method")
    if isinstance(scheme.bits, bool) or not isinstance(scheme.bits, int) or not 2 <= scheme.bits <= 16:
        raise UserError(f"{where}, bits: got {scheme.bits!r}, accepted: whole numbers from 2 to 16")
    if not 0 < scheme.percentile <= 100:
        raise UserError(f"{where}, percentile: got {scheme.percentile!r}, accepted: above 0, up to 100")
    if scheme.format == "fp8_e4m3" and (scheme.bits != 8 or not scheme.signed or scheme.narrow_range):
        raise UserError(f"{where}: format fp8_e4m3 has 8 bits, signed, and no narrow_range; got {scheme!r}")
    if is_weight and not scheme.signed:
        raise UserError(f"{where}, signed: got False, accepted: True (weights have both signs)")


def _one_of(value: Any, accepted: Iterable[str], where: str) -> None:
    if value not in tuple(accepted):
        raise UserError(f"{where}: got {value!r}, accepted: {', '.join(accepted)}")
