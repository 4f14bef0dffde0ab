"""Bits for the parts of a network: what each choice costs, and the schemes that say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import Any, Literal

import yaml

from cpq_train.common.files import write_whole
from cpq_train.quantization.bits.assignment import Choice, Choices
from cpq_train.quantization.costs import LayerCost, bit_macs, stored_mib
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme

FLOAT = "float"
"""The option of a unit that is not quantized."""

FIXED = "left in float by the scheme"
"""Stands for the layers without a choice, which count for a budget all the same."""

Budget = Literal["mib", "bit_macs"]
Losses = Mapping[str, Mapping[str, float]]
"""Unit -> option -> loss."""


@dataclass(frozen=True)
class Option:
    """A choice of bits; None for the inputs keeps those of the scheme."""

    weight_bits: int
    input_bits: int | None = None

    @property
    def name(self) -> str:
        """`W4`, or `W4A8` where the inputs are chosen too."""
        return f"W{self.weight_bits}" + ("" if self.input_bits is None else f"A{self.input_bits}")

    def rule(self, layers: str) -> dict[str, Any]:
        """The rule of a scheme that gives these bits to what is quantized of `layers`."""
        inputs = {} if self.input_bits is None else {"input": {"bits": self.input_bits}}
        return {"layers": layers, "weight": {"bits": self.weight_bits}, **inputs}


@dataclass(frozen=True)
class Unit:
    """Layers that get the same option: a single layer, or those of the module `name`."""

    name: str
    layers: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The glob of a scheme's rule."""
        return self.name if self.layers == (self.name,) else f"{self.name}.*"


def uniform_scheme(base: Scheme, option: Option) -> dict[str, Any]:
    """`base` with the option's bits wherever it quantizes, as the content of a scheme file."""
    return _extended(base, option.name, [option.rule("*")])


def mixed_scheme(
    base: Scheme, units: Iterable[Unit], options: Iterable[Option], assignment: Mapping[str, str]
) -> dict[str, Any]:
    """`base` with each unit's assigned option, as the content of a scheme file."""
    by_name = {option.name: option for option in options}
    rules = []
    for unit in units:
        option = by_name.get(assignment[unit.name])
        off = {"layers": unit.pattern, "weight": "off", "input": "off"}
        rules.append(off if option is None else option.rule(unit.pattern))
    return _extended(base, "mixed", rules)


def write_scheme(path: Path, content: Mapping[str, Any], comment: str = "") -> None:
    """Write the content of a scheme as a file that `Scheme.from_file` reads."""
    text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=110)
    write_whole(path, (f"# {comment}\n" if comment else "") + text)


def _extended(base: Scheme, suffix: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    content = base.to_dict()
    return {**content, "name": f"{base.name}_{suffix}", "rules": [*content["rules"], *rules]}


@dataclass(frozen=True)
class BitPlan:
    """The choices of bits for a network.

    Args:
        base: Gives everything but the bits; what it leaves in float stays float.
        kinds: Name -> kind of every layer that can be quantized.
        costs: Name -> size of the layer.
        groups: Name -> layers that get the same bits; together all of `kinds`.
        options: What there is to choose from, beside float.

    Raises:
        UserError: The base or an option does not resolve.
    """

    base: Scheme
    kinds: Mapping[str, str]
    costs: Mapping[str, LayerCost]
    groups: Mapping[str, Iterable[str]]
    options: tuple[Option, ...]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What there is to choose for."""
        chosen = self.base.resolve(self.kinds)
        quantized = {n: tuple(x for x in group if not chosen[x].is_float) for n, group in self.groups.items()}
        return tuple(Unit(name, layers) for name, layers in quantized.items() if layers)

    @cached_property
    def uniform(self) -> dict[str, Scheme]:
        """Option -> the scheme with the option everywhere."""
        schemes = {o.name: Scheme.from_dict(uniform_scheme(self.base, o)) for o in self.options}
        for scheme in schemes.values():
            scheme.resolve(self.kinds)  # says now what is wrong with the bits
        return schemes

    def size(self, scheme: Scheme) -> dict[str, float]:
        """What a scheme costs: MiB of the weights, and bit-MACs as a share of the float network's."""
        return {b: self._cost(b, scheme.resolve(self.kinds), self.kinds) for b in ("mib", "bit_macs")}

    def _cost(self, budget: str, schemes: Mapping[str, LayerScheme], layers: Iterable[str]) -> float:
        if budget == "mib":
            return fsum(stored_mib(self.costs[x], schemes[x]) for x in layers)
        return fsum(bit_macs(self.costs[x], schemes[x]) for x in layers) / self._float_bit_macs

    @cached_property
    def _float_bit_macs(self) -> float:
        return fsum(bit_macs(cost, _ALL_FLOAT) for cost in self.costs.values())

    def choices(self, losses: Losses, budget: Budget) -> Choices:
        """What each option means for each unit.

        A unit without weights or products (a residual add) is not offered float: no budget would see what
        that costs a deployed network.
        """
        schemes = {name: scheme.resolve(self.kinds) for name, scheme in self.uniform.items()}
        floats = dict.fromkeys(self.kinds, _ALL_FLOAT)
        choices: dict[str, dict[str, Choice]] = {}
        for unit in self.units:
            offered = {
                o: Choice(losses[unit.name][o], self._cost(budget, schemes[o], unit.layers)) for o in schemes
            }
            if any(self.costs[layer].num_weights for layer in unit.layers):
                offered[FLOAT] = Choice(0.0, self._cost(budget, floats, unit.layers))
            choices[unit.name] = offered
        with_choice = {layer for unit in self.units for layer in unit.layers}
        fixed = [layer for layer in self.kinds if layer not in with_choice]
        return {**choices, FIXED: {FLOAT: Choice(0.0, self._cost(budget, floats, fixed))}}


_OFF = QuantizerScheme(mode="off")
_ALL_FLOAT = LayerScheme(_OFF, _OFF)
