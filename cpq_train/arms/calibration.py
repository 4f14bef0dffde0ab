"""The ranges of a quantized network, found on samples or given, and what its checkpoint says of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from cpq_train.arms.coverage import coverage_table
from cpq_train.arms.starting_point import Batches, CalibrationConfig, improve
from cpq_train.arms.subject import Subject
from cpq_train.common.console import print_plain
from cpq_train.common.progress import track
from cpq_train.quantization.health import Problem, table
from cpq_train.quantization.prepare import settle_unfit
from cpq_train.quantization.ranges.bias_steps import check_biases, widen_steps
from cpq_train.quantization.ranges.calibration import collecting_ranges

Forward = Callable[[nn.Module, Any], Any]


class CalibrationSamples(Protocol):
    """A data module, as far as calibration needs one."""

    def calibration_dataloader(self) -> Batches:
        """This rank's batches of the calibration samples."""

    def calibration_info(self) -> dict[str, Any]:
        """What a checkpoint says of the samples of all ranks."""


def calibrate(
    subject: Subject,
    samples: CalibrationSamples,
    forward: Forward,
    config: CalibrationConfig,
    given: Mapping[str, Tensor] | None = None,
    show: bool = True,
) -> None:
    """Find the activation ranges of a network, in place; each sample is seen by one rank.

    Args:
        subject: A quantized network; its `calibration` says afterwards what was done.
        samples: The calibration samples, for which nobody asks where `given` has every range.
        forward: Runs a network on one batch.
        config: What calibration does beyond finding ranges.
        given: Ranges known already, by their names in the network's state dict.
        show: Whether tables and progress are printed.

    Raises:
        UserError: There are no such samples, or a range came out unfit, or a step too small for a bias, and
            the scheme has it an error.
    """
    assert subject.scheme is not None
    if show:
        print_plain(coverage_table(subject.prepared))
    given = dict(given or {})
    subject.network.load_state_dict(given, strict=False)
    seen: dict[str, Any] = {"num_samples": 0}
    if not given or subject.needs_calibration:
        _collect_ranges(subject, samples.calibration_dataloader(), forward, show)
        subject.network.load_state_dict(given, strict=False)
        seen = samples.calibration_info()
    _fit_biases(subject.network, show)  # bias correction would take what saturates for an error
    subject.calibration = {
        "method": subject.scheme.defaults.input.method,
        **seen,
        "source_sha256": subject.parents.get("float"),
        "left_in_float": list(subject.prepared.left_in_float),
        **improve(subject, samples.calibration_dataloader, forward, config, show),
    }
    _fit_biases(subject.network, show)


def _collect_ranges(subject: Subject, batches: Batches, forward: Forward, show: bool) -> None:
    with collecting_ranges(subject.network, partial(_on_unfit, subject, show)):
        for batch in track(batches, "Calibrating (batches)" if show else None):
            forward(subject.network, batch)


def _fit_biases(network: nn.Module, show: bool) -> None:
    """Widen the steps that are too small for a bias where the scheme says so; elsewhere they are an error."""
    widened = widen_steps(network)
    if widened and show:
        lines = "".join(f"\n  {name}: channels {', '.join(map(str, c))}" for name, c in widened.items())
        print_plain(f"warning: steps of weights widened, too small for their biases:{lines}", style="yellow")
    check_biases(network)


def _on_unfit(subject: Subject, show: bool, problems: list[Problem]) -> None:
    """What the scheme has done about unfit ranges: an error, or a warning and layers left in float."""
    settle_unfit(subject.network, problems)
    subject.scheme = subject.prepared.scheme
    if show:
        text = f"warning: {len(subject.prepared.left_in_float)} layers stay float:\n{table(problems)}"
        print_plain(text, style="yellow")
        print_plain(coverage_table(subject.prepared))
