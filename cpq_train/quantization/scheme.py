"""What to quantize how: a YAML file of defaults and an ordered list of rules, resolved against a network.

    name: int8
    share_residual: true
    defaults:
      weight: {bits: 8, granularity: per_channel, method: max}
      input: {bits: 8, granularity: per_tensor, method: mse}
    rules:                                    # later rules win
      - layers: "backbone_3d.conv_input.*"    # glob over module names
        weight: off
        input: off

`kinds` restricts a rule to kinds of layer (`Conv2d`, `ConvTranspose2d`, `SubMConv3d`, `SparseConv3d`,
`ResidualAdd`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from cpq_train.errors import UserError
from cpq_train.quantization.fake_quant import IntegerFormat

KINDS = ("SubMConv3d", "SparseConv3d", "Conv2d", "ConvTranspose2d", "ResidualAdd")
"""The kinds of layer that can be quantized."""

OUTPUT_CHANNEL_AXIS = {"SubMConv3d": 0, "SparseConv3d": 0, "Conv2d": 0, "ConvTranspose2d": 1}
"""Axis of the output channels in a weight: spconv 2 stores KRSC; ConvTranspose2d stores (in, out, kH, kW)."""

INPUT_METHODS = ("max", "percentile", "mse", "entropy", "foreground")
WEIGHT_METHODS = ("max",)
GRANULARITIES = ("per_tensor", "per_channel")
MODES = ("static", "dynamic", "off")


@dataclass(frozen=True)
class QuantizerScheme:
    """How one tensor is quantized.

    Args:
        bits: 2 to 16.
        signed: Two's complement or non-negative codes.
        narrow_range: Leave out the most negative code.
        granularity: One amax per tensor, or one per output channel (weights only).
        method: How amax is found: max; for inputs also percentile, mse, entropy, foreground.
        mode: static (amax found by calibration), dynamic (max of each tensor), off (stays float).
        percentile: Share of the values kept inside amax, in percent, for `method: percentile`.
        count_zeros: Whether zeros take part in percentile and entropy. A BEV map is mostly zeros, which
            say nothing about the range.
    """

    bits: int = 8
    signed: bool = True
    narrow_range: bool = False
    granularity: str = "per_tensor"
    method: str = "max"
    mode: str = "static"
    percentile: float = 99.99
    count_zeros: bool = False

    @property
    def format(self) -> IntegerFormat:
        """The integers in use."""
        return IntegerFormat(self.bits, self.signed, self.narrow_range)

    @property
    def is_off(self) -> bool:
        """Whether the tensor stays float."""
        return self.mode == "off"


@dataclass(frozen=True)
class LayerScheme:
    """The resolved choice for one layer; `weight` is off for a residual add."""

    weight: QuantizerScheme
    input: QuantizerScheme

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weight.is_off and self.input.is_off

    @property
    def arithmetic(self) -> str:
        """`integer` where the layer is a sum of integer products times a scale, `simulated` otherwise.

        Codes of 8 + 8 bits and below have products that sum exactly in fp32 when the sum is split.
        """
        if self.weight.is_off and not self.input.is_off:
            return "simulated"
        both = not self.weight.is_off and not self.input.is_off
        return "integer" if both and self.weight.bits + self.input.bits <= 16 else "simulated"


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
        _check_keys(content, {"name", "defaults", "rules", "share_residual"}, where)
        defaults = content.get("defaults", {})
        _check_keys(defaults, {"weight", "input"}, f"{where}, defaults")
        weight = QuantizerScheme(granularity="per_channel")
        rules = [_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(content.get("rules") or [])]
        return cls(
            name=str(content.get("name", "unnamed")),
            weight=_override(weight, defaults.get("weight", {}), "weight", f"{where}, defaults"),
            input=_override(QuantizerScheme(), defaults.get("input", {}), "input", f"{where}, defaults"),
            rules=tuple(rules),
            share_residual=bool(content.get("share_residual", True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal scheme."""
        return {
            "name": self.name,
            "share_residual": self.share_residual,
            "defaults": {"weight": asdict(self.weight), "input": asdict(self.input)},
            "rules": [
                {"layers": r.layers, "kinds": list(r.kinds), "weight": dict(r.weight), "input": dict(r.input)}
                for r in self.rules
            ],
        }

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
        weight, input_ = self.weight, self.input
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(name, kind):
                where = f"scheme {self.name!r}, rule {number}"
                weight = _override(weight, rule.weight, "weight", where)
                input_ = _override(input_, rule.input, "input", where)
        if kind == "ResidualAdd":
            weight = replace(weight, mode="off")
        return LayerScheme(weight, input_)


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
    _one_of(scheme.mode, MODES, f"{where}, mode")
    _one_of(
        scheme.granularity, GRANULARITIES if role == "weight" else ("per_tensor",), f"{where}, granularity"
    )
    _one_of(scheme.method, WEIGHT_METHODS if role == "weight" else INPUT_METHODS, f"{where}, method")
    if isinstance(scheme.bits, bool) or not isinstance(scheme.bits, int) or not 2 <= scheme.bits <= 16:
        raise UserError(f"{where}, bits: got {scheme.bits!r}, accepted: whole numbers from 2 to 16")
    if not 0 < scheme.percentile <= 100:
        raise UserError(f"{where}, percentile: got {scheme.percentile!r}, accepted: above 0, up to 100")


def _one_of(value: Any, accepted: Iterable[str], where: str) -> None:
    if value not in tuple(accepted):
        raise UserError(f"{where}: got {value!r}, accepted: {', '.join(accepted)}")
