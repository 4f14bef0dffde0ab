"""`sensitivity`: what CenterPoint's parts lose to quantization, and the bits they get within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.models.topology import blocks_of
from cpq_train.quantization.bits.assignment import assign, check_feasible, total
from cpq_train.quantization.bits.bit_plan import (
    FIXED,
    BitPlan,
    Budget,
    Option,
    mixed_scheme,
    write_scheme,
)
from cpq_train.quantization.bits.report import write_report
from cpq_train.quantization.bits.sensitivity import Case, MeasurementLog, alone, cases_of, measure
from cpq_train.quantization.prepare import quantizable_layers
from cpq_train.quantization.scheme import Scheme
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.sensitivity_bench import SensitivityBench

Record = dict[str, Any]

ADVISED_NUM_SAMPLES = 8
"""Of `--num_samples`, which is also the default; on fewer the order of the units is that of these samples."""

BUDGET_UNITS: dict[Budget, str] = {"mib": "MiB of weights", "bit_macs": "of the float network's bit-MACs"}


@dataclass(frozen=True)
class SensitivitySettings:
    """What to measure and what to assign; see `QuantTrainer.sensitivity`.

    Raises:
        UserError: They contradict one another.
    """

    output: Path
    by: Literal["block", "layer"] = "block"
    bits: Sequence[int] = (8, 4)
    input_bits: Sequence[int] | None = None
    budget_mib: float | None = None
    budget_bit_macs: float | None = None
    metric: Literal["proxy", "nds"] = "proxy"
    num_samples: int = ADVISED_NUM_SAMPLES

    def __post_init__(self) -> None:
        if self.input_bits is not None and len(self.input_bits) != len(self.bits):
            raise UserError(
                f"--input_bits is {list(self.input_bits)}: expected one for each of --bits {list(self.bits)}"
            )
        if not self.bits or len(set(self.options)) != len(self.bits):
            raise UserError(f"--bits is {list(self.bits)}: expected one choice or more, and none twice")
        if self.budget_mib is not None and self.budget_bit_macs is not None:
            raise UserError("--budget_mib and --budget_bit_macs are both given: expected one of them")

    @property
    def options(self) -> tuple[Option, ...]:
        """The choices of bits."""
        inputs = self.input_bits or (None,) * len(self.bits)
        return tuple(Option(*bits) for bits in zip(self.bits, inputs, strict=True))

    @property
    def budget(self) -> tuple[Budget, float] | None:
        """What is limited, and to how much."""
        if self.budget_mib is not None:
            return "mib", self.budget_mib
        return None if self.budget_bit_macs is None else ("bit_macs", self.budget_bit_macs)


def analyse(
    model: CenterPointDetector, data: NuScenesDataModule, settings: SensitivitySettings, device: torch.device
) -> None:
    """Measure, rank and, if there is a budget, assign; writes into `settings.output`.

    Raises:
        UserError: The scheme is missing or unfit, the budget cannot be met, or the data or the checkpoint
            are unusable.
    """
    if model.weights is None or model.scheme_file is None:
        raise UserError("sensitivity needs model.weights, a float checkpoint, and model.scheme")
    if settings.metric == "nds" and not data.task.is_nuscenes:
        raise UserError("--metric is nds, which data.classes have not; accepted with them: proxy")
    folder = settings.output / "schemes"
    bench = SensitivityBench(model, data, settings.num_samples, settings.metric == "nds", folder, device)
    if settings.num_samples < ADVISED_NUM_SAMPLES:
        print_plain(
            f"caution: losses on few samples (--num_samples {settings.num_samples}) rank units badly: "
            f"others may turn their order round; advised: {ADVISED_NUM_SAMPLES} or more",
            style="yellow",
        )
    plan = _plan(Scheme.from_file(model.scheme_file), bench, settings)
    folder.mkdir(parents=True, exist_ok=True)
    log = MeasurementLog(settings.output / "measurements.jsonl")

    def measured(cases: Iterable[Case]) -> list[Record]:
        return measure(cases, bench.prepare, log, bench.context)

    records = measured(c for name, scheme in plan.uniform.items() for c in cases_of(scheme, name, plan.units))
    result = {
        "schema": 1,
        "checkpoint": model.weights,
        "depends_on": bench.context,
        "metric": settings.metric,
        **_describe(plan, settings),
        "measurements": records,
        "networks": [_uniform(plan, name, records) for name in plan.uniform],
        **_assigned(plan, settings, records, measured),
    }
    write_report(settings.output, result)


def _plan(base: Scheme, bench: SensitivityBench, settings: SensitivitySettings) -> BitPlan:
    kinds = quantizable_layers(bench.float_network)
    by_layer = {name: [name] for name in kinds}
    groups = by_layer if settings.by == "layer" else blocks_of(bench.float_network)
    plan = BitPlan(base, kinds, bench.costs(kinds), groups, settings.options)
    if settings.budget is not None:
        kind, limit = settings.budget
        unknown = {unit.name: dict.fromkeys(plan.uniform, 0.0) for unit in plan.units}
        check_feasible(plan.choices(unknown, kind), limit, BUDGET_UNITS[kind])
    return plan


def _describe(plan: BitPlan, settings: SensitivitySettings) -> Record:
    return {
        "base": plan.base.to_dict(),
        "by": settings.by,
        "options": list(plan.uniform),
        "units": {unit.name: list(unit.layers) for unit in plan.units},
        "costs": {name: cost._asdict() for name, cost in plan.costs.items()},
    }


def _uniform(plan: BitPlan, name: str, records: list[Record]) -> Record:
    (whole,) = (r for r in records if r["mode"] == "all" and r["option"] == name)
    predicted = sum(losses[name] for losses in alone(records).values())
    return {"name": name, **plan.size(plan.uniform[name]), "predicted_loss": predicted, **whole}


def _assigned(
    plan: BitPlan,
    settings: SensitivitySettings,
    records: list[Record],
    measured: Callable[[Iterable[Case]], list[Record]],
) -> Record:
    """The assignment within the budget, its scheme and what that measures; empty without a budget."""
    if settings.budget is None:
        return {"budget": None}
    kind, limit = settings.budget
    choices, unit = plan.choices(alone(records), kind), BUDGET_UNITS[kind]
    assignment = assign(choices, limit, unit)
    content = mixed_scheme(plan.base, plan.units, settings.options, assignment)
    write_scheme(settings.output / "scheme.yaml", content, f"least predicted loss within {limit:g} {unit}")
    scheme = Scheme.from_dict(content)
    quantized = tuple(name for name, chosen in scheme.resolve(plan.kinds).items() if not chosen.is_float)
    (whole,) = measured([Case(scheme, "mixed", "all", None, quantized)])
    predicted = total(choices, assignment).loss
    return {
        "budget": {"kind": kind, "limit": limit, "unit": unit},
        "assignment": {name: option for name, option in assignment.items() if name != FIXED},
        "mixed": {"name": "mixed", **plan.size(scheme), "predicted_loss": predicted, **whole},
    }
