"""The quantizer: pytorch-quantization's TensorQuantizer with our formula and our calibration."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import absl.logging
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.compiler import is_compiling

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.calibrators.collectors import Collector, new_collector
from cpq_train.quantization.calibrators.weight_ranges import largest_magnitude, weight_amax
from cpq_train.quantization.numerics import fake_quant
from cpq_train.quantization.numerics.coded import Coded, codes_of
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.numerics.one_pass import Scalars, has_byte_codes
from cpq_train.quantization.scheme import QuantizerScheme
from cpq_train.quantization.scope import (
    Scope,
    are_saved_tensors_hooked,
    is_gradient_watched,
    modes_of,
)

# Importing pytorch-quantization puts absl's handler on the root logger, which would change every user's log
# lines.
logging.root.removeHandler(absl.logging.get_absl_handler())


class Range(NamedTuple):
    """An amax and what follows from it.

    Attributes:
        amax: Broadcastable to the tensor.
        scale: Codes per unit, see `fake_quant.scale_of`.
        step: Value of code 1, see `fake_quant.step_of`.
        window: amax as a Python number, where it is static, stands for the whole tensor, and is at hand (on
            the CPU, while nothing is traced).
        log_amax: The parameter that amax follows from, where it is learned.
    """

    amax: Tensor
    scale: Tensor
    step: Tensor
    window: float | None = None
    log_amax: nn.Parameter | None = None

    @property
    def limit(self) -> Tensor | float:
        """amax, as a number if it is known as one."""
        return self.amax if self.window is None else self.window


class Quantizer(TensorQuantizer):
    """Fake quantization of one tensor.

    The buffer `_amax` exists from the start, as NaN until it is calibrated or loaded, so that a state dict
    loads on any device; `calibration.check_ranges` finds what was left NaN. A dynamic quantizer has no
    buffer. A learned range is trained as the parameter `_log_amax`, so that amax stays positive and a
    learning rate means the same for a range of 0.01 and one of 100; the buffer follows it. `step_of_zero` is
    the value of code 1 where amax is at most 2^-24. `num_readers` layers read one tensor through it; `scope`,
    which `prepare` makes one for a network, is what it remembers meanwhile.

    Args:
        scheme: Bits, granularity, method and mode; `mode` is static or dynamic.
        axis: Axis of the output channels for per-channel weights, None for one amax per tensor.
        num_channels: Length of that axis.
        num_dims: Number of dimensions of the weight (amax keeps them all, as pytorch-quantization does).
    """

    def __init__(
        self,
        scheme: QuantizerScheme,
        axis: int | None = None,
        num_channels: int = 1,
        num_dims: int = 0,
    ) -> None:
        super().__init__(
            QuantDescriptor(
                num_bits=scheme.number_format.bits,
                unsigned=not scheme.signed,
                narrow_range=scheme.narrow_range,
                axis=None if axis is None else (axis,),
                calib_method="max",
            )
        )
        self._calibrator: Collector | None = None
        self.scheme = scheme
        self.format = scheme.number_format
        self.num_readers = 1
        self._log_amax: nn.Parameter | None = None
        self.scope = Scope()
        self.step_of_zero = 1.0
        if scheme.mode == "static":
            shape = [num_channels if d == axis else 1 for d in range(num_dims)] if axis is not None else []
            self.register_buffer("_amax", torch.full(shape, torch.nan))

    @property
    def amax(self) -> Tensor | None:
        """The static range; None of a dynamic quantizer."""
        self.sync_amax()
        return getattr(self, "_amax", None)

    @property
    def is_per_tensor(self) -> bool:
        """Whether one amax stands for the whole tensor."""
        return self._axis is None

    @property
    def is_shared(self) -> bool:
        """Whether several layers read one tensor through it."""
        return self.num_readers > 1

    @property
    def is_active(self) -> bool:
        """Whether the tensor is rounded."""
        return not self._disabled

    def forward(self, inputs: Tensor) -> Tensor:
        """The fake-quantized tensor; while switched off, the tensor itself."""
        if not self.is_active:
            return inputs
        chosen = self.range_of(inputs)
        return fake_quant.fake_quantize(
            inputs, chosen.amax, self.format, chosen.window, chosen.scale, chosen.log_amax
        )

    def codes(
        self, tensor: Tensor, grad_factor: Tensor | None = None, row_axis: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Integer codes (held in fp32) and the value of one step.

        Args:
            tensor: A weight, or what is read once.
            grad_factor: Multiplies the gradient of the codes, which is then that of the values.
            row_axis: Of a weight's output channels.
        """
        chosen = self.range_of(tensor)
        how = chosen.amax, self.format, chosen.window, grad_factor, chosen.scale, chosen.log_amax
        codes = fake_quant.codes(tensor, *how, row_axis)
        return codes, chosen.step

    def coded(self, inputs: Tensor) -> Coded:
        """The codes of a tensor for those who read it.

        However many layers ask for it in a forward pass, it is rounded once, at best by the ReLU that made it
        (`layers/activation.py`).
        """
        # A checkpoint has to save as much in every run, whoever ran before.
        is_hooked = torch.is_grad_enabled() and are_saved_tensors_hooked()
        if is_hooked or is_gradient_watched(inputs) or not self._remembers(inputs):
            return self._code(inputs)
        self.scope.note_reader(inputs, self)
        known = self.scope.codes.once(
            self, inputs, lambda: self._code(inputs), self.num_readers, modes_of(inputs)
        )
        return cast(Coded, known)

    def _code(self, inputs: Tensor) -> Coded:
        chosen, x = self.range_of(inputs), fake_quant.full_precision(inputs)
        codes = codes_of(x, chosen.scale, self.format)
        if not (torch.is_grad_enabled() and x.requires_grad) and chosen.log_amax is None:
            return Coded(x, codes)
        how = chosen.amax, self.format, chosen.window, chosen.scale, chosen.step, chosen.log_amax
        return Coded(fake_quant.source_of(x, *how), codes)

    def scalars(self) -> Scalars | None:
        """The range for passes over a tensor; None unless it is one number, static, of integers.

        The loops of the CPU make bytes, and do not learn.
        """
        if not self.is_active or self._if_calib or self.scheme.mode != "static" or not self.is_per_tensor:
            return None
        chosen = self.range_of(self._amax)
        if not isinstance(self.format, IntegerFormat):
            return None
        is_for_loops = are_numbers_at_hand(self._amax.device)
        if is_for_loops and (chosen.log_amax is not None or not has_byte_codes(self.format)):
            return None
        return Scalars(chosen.scale, chosen.step, chosen.amax, self.format, chosen.log_amax)

    def _remembers(self, inputs: Tensor) -> bool:
        """Whether other readers of a tensor may have what is made of it now.

        Of a tensor of inference mode nobody knows whether it is written to in between, as by dropout in
        place; in evaluation mode it is not, as the run has shown that `prepare` makes.
        """
        is_known = not (self.training and inputs.is_inference())
        return is_known and self.scope.is_in_forward and not is_compiling()

    def range_of(self, inputs: Tensor) -> Range:
        """The range to quantize `inputs` with; a static one is worked out once in an open scope."""
        if self.scheme.mode != "static":
            return self._new_range(self._largest(inputs))
        if is_compiling() or not self.scope.is_open:
            return self._static_range()
        known: Range | None = self.scope.ranges.get(self)
        if known is None:
            # Not in inference mode: what is made there could not be saved for a backward pass in this scope.
            with torch.inference_mode(False):
                known = self.scope.ranges[self] = self.scope.range_of(self) or self._static_range()
        return known

    def _static_range(self) -> Range:
        if self._log_amax is not None:
            return self._new_range(self._log_amax.detach().exp(), log_amax=self._log_amax)
        is_at_hand = self.is_per_tensor and not is_compiling() and are_numbers_at_hand(self._amax.device)
        return self._new_range(self._amax, float(self._amax) if is_at_hand else None)

    def _new_range(
        self, amax: Tensor, window: float | None = None, log_amax: nn.Parameter | None = None
    ) -> Range:
        scale = fake_quant.scale_of(amax, self.format)
        step = fake_quant.step_of(amax, self.format, self.step_of_zero)
        return Range(amax, scale, step, window, log_amax)

    def learn(self) -> None:
        """Make a static range a parameter that starts at the present amax; nothing to do for others."""
        if self.scheme.mode == "static" and self._log_amax is None:
            self._log_amax = nn.Parameter(torch.empty_like(self._amax))
            self._log_from_amax()

    def freeze(self) -> None:
        """Keep a learned range as it is."""
        if self._log_amax is not None:
            self.sync_amax()
            del self._log_amax
            self._log_amax = None

    def start_collecting(self) -> None:
        """Gather the range of the tensors that pass; nothing to do for a dynamic quantizer."""
        if self.scheme.mode == "static":
            self._calibrator = new_collector(self.scheme)
            self._if_calib = True

    def collect(self, inputs: Tensor) -> None:
        """Take in one tensor, once in a forward pass even where it has several consumers."""
        if self.is_shared and self._remembers(inputs):
            self.scope.collected.once(self, inputs, lambda: self._take_in(inputs), self.num_readers)
        else:
            self._take_in(inputs)

    def _take_in(self, inputs: Tensor) -> None:
        assert self._calibrator is not None
        self._calibrator.collect(fake_quant.full_precision(inputs.detach()))

    def finish_collecting(self, momentum: float | None = None) -> tuple[str, str] | None:
        """Set amax from what all ranks gathered; it is NaN where nothing was seen.

        Args:
            momentum: Instead of setting amax, move it so far towards what was gathered, if that is fit: a
                range that was found once outlasts a step without a voxel.

        Returns:
            What makes the range unfit, and in how many values; None where nothing does.
        """
        problem = None
        if self._calibrator is not None:
            self._calibrator.reduce(self._amax.device)
            problem = self._calibrator.problem()
            if momentum is None or problem is None:
                found = torch.full_like(self._amax, self._calibrator.compute_amax())
                self._move_amax(found, 1.0 if momentum is None else momentum)
        self.stop_collecting()
        return problem

    def stop_collecting(self) -> None:
        """Round again; what was gathered is dropped."""
        self._calibrator, self._if_calib = None, False

    def set_amax_from(self, weight: Tensor, momentum: float = 1.0) -> None:
        """Static range of a weight, per channel where the scheme says so.

        Args:
            weight: The weight.
            momentum: Share of the new amax in the result, the rest is the present one.
        """
        if self.scheme.mode == "static":
            axis = None if self._axis is None else self._axis[0]
            self._move_amax(weight_amax(weight, self.scheme, axis), momentum)

    def set_amax(self, amax: Tensor) -> None:
        """Set a static range to a value found elsewhere."""
        self._move_amax(amax, momentum=1.0)

    def _move_amax(self, found: Tensor, momentum: float) -> None:
        # At 1 the present amax has no part in it: it may be NaN.
        self._amax.copy_(found if momentum == 1.0 else self._amax.lerp(found, momentum))
        self._log_from_amax()

    def scale_amax(self, factor: Tensor) -> None:
        """Multiply a static range, as the weight it belongs to is; `factor` broadcasts to amax."""
        if self.scheme.mode != "static":
            return
        self._amax.copy_(self._amax.double() * factor)
        self._log_from_amax()

    @torch.no_grad()
    def sync_amax(self) -> None:
        """Let the buffer follow a learned range, which the optimizer may have moved since it was read."""
        if self._log_amax is not None:
            self._amax.copy_(self._log_amax.exp())

    @torch.no_grad()
    def _log_from_amax(self) -> None:
        if self._log_amax is not None:
            self._log_amax.copy_(self._amax.clamp(min=fake_quant.SMALLEST_AMAX).log())
            self.sync_amax()  # now and not when it is next read: they differ in a last digit

    def _largest(self, tensor: Tensor) -> Tensor:
        return largest_magnitude(tensor.detach(), None if self._axis is None else self._axis[0])

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.sync_amax()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # pytorch-quantization's version calls .cuda() and warns about every amax.
        nn.Module._load_from_state_dict(self, *args, **kwargs)
