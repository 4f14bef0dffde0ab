"""The quantizer: pytorch-quantization's TensorQuantizer with our formula and our calibration."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import absl.logging
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from cpq_train.quantization import fake_quant
from cpq_train.quantization.collectors import Collector, new_collector
from cpq_train.quantization.scheme import QuantizerScheme

# Importing pytorch-quantization puts absl's handler on the root logger, which would change every user's log
# lines.
logging.root.removeHandler(absl.logging.get_absl_handler())


class Range(NamedTuple):
    """An amax and what follows from it.

    Attributes:
        amax: Broadcastable to the tensor.
        version: How often amax had been written to.
        scale: Codes per unit, see `fake_quant.scale_of`.
        step: Value of code 1, see `fake_quant.step_of`.
        window: amax as a Python number, where it is static and stands for the whole tensor.
    """

    amax: Tensor
    version: int
    scale: Tensor
    step: Tensor
    window: float | None

    @property
    def limit(self) -> Tensor | float:
        """amax, as a number if it is known as one."""
        return self.amax if self.window is None else self.window


class Quantizer(TensorQuantizer):
    """Fake quantization of one tensor.

    The buffer `_amax` exists from the start, as NaN until it is calibrated or loaded, so that a state dict
    loads on any device; `calibration.check_ranges` finds what was left NaN. A dynamic quantizer has no
    buffer.

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
                num_bits=scheme.bits,
                unsigned=not scheme.signed,
                narrow_range=scheme.narrow_range,
                axis=None if axis is None else (axis,),
                calib_method="max",
            )
        )
        self._calibrator: Collector | None = None
        self.scheme = scheme
        self.format = scheme.format
        self.is_shared = False
        self._memo: tuple[Tensor, Tensor] | None = None
        self._range: Range | None = None
        if scheme.mode == "static":
            shape = [num_channels if d == axis else 1 for d in range(num_dims)] if axis is not None else []
            self.register_buffer("_amax", torch.full(shape, torch.nan))

    @property
    def is_per_tensor(self) -> bool:
        """Whether one amax stands for the whole tensor."""
        return self._axis is None

    @property
    def is_active(self) -> bool:
        """Whether the tensor is rounded: not while switched off, nor while its range is being collected."""
        return not self._disabled and not self._if_calib

    def forward(self, inputs: Tensor) -> Tensor:
        """The fake-quantized tensor; while a range is being collected, or switched off, the tensor itself."""
        if self._if_calib:
            self.collect(inputs)
        if not self.is_active:
            return inputs
        chosen = self.range_of(inputs)
        return fake_quant.fake_quantize(inputs, chosen.amax, self.format, chosen.window, chosen.scale)

    def codes(self, inputs: Tensor, step_other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Integer codes (held in fp32) and the value of one step.

        A shared quantizer rounds a tensor once, however many layers ask for it, until `forget`.

        Args:
            inputs: The tensor.
            step_other: For a weight, the step of the input it meets: the gradient of the codes is then put
                right for `fake_quant.rescale`.
        """
        chosen = self.range_of(inputs)
        if self.is_shared and self._memo is not None and self._memo[0] is inputs:
            return self._memo[1], chosen.step
        factor = None if step_other is None else step_other / chosen.step
        codes = fake_quant.codes(inputs, chosen.amax, self.format, chosen.window, factor, chosen.scale)
        if self.is_shared:
            self._memo = (inputs, codes)
        return codes, chosen.step

    def range_of(self, inputs: Tensor) -> Range:
        """The range to quantize `inputs` with; a static one is worked out, and read from its device, once."""
        amax = self._get_amax(inputs)
        if self.scheme.mode != "static":
            return self._new_range(amax, 0, None)
        known = self._range
        if known is None or known.amax is not amax or known.version != amax._version:
            # Not in inference mode: what is made there could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                known = self._new_range(amax, amax._version, float(amax) if self.is_per_tensor else None)
            self._range = known
        return known

    def _new_range(self, amax: Tensor, version: int, window: float | None) -> Range:
        fmt = self.format
        return Range(amax, version, fake_quant.scale_of(amax, fmt), fake_quant.step_of(amax, fmt), window)

    def forget(self) -> None:
        """Drop the codes kept for the other consumers of a shared tensor."""
        self._memo = None

    def start_collecting(self) -> None:
        """Pass tensors through unrounded and gather their range; nothing to do for a dynamic quantizer."""
        if self.scheme.mode == "static":
            self._calibrator = new_collector(self.scheme)
            self._if_calib = True

    def collect(self, inputs: Tensor) -> None:
        """Take in one tensor, once even where it has several consumers."""
        if self._memo is not None and self._memo[0] is inputs:
            return
        assert self._calibrator is not None
        self._calibrator.collect(inputs.detach())
        if self.is_shared:
            self._memo = (inputs, inputs)

    def finish_collecting(self) -> None:
        """Set amax from what was gathered; it stays NaN where nothing was seen."""
        if self._calibrator is not None:
            self._amax.fill_(self._calibrator.compute_amax())
        self._calibrator, self._if_calib = None, False
        self.forget()

    def set_amax_from(self, weight: Tensor) -> None:
        """Static range of a weight: the largest magnitude, per output channel where the scheme says so."""
        if self.scheme.mode == "static":
            self._amax.copy_(self._largest(weight))

    def _get_amax(self, inputs: Tensor) -> Tensor:
        return self._amax if self.scheme.mode == "static" else self._largest(inputs)

    def _largest(self, tensor: Tensor) -> Tensor:
        magnitude = tensor.detach().abs()
        if self.is_per_tensor:
            return magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
        return magnitude.amax([d for d in range(tensor.dim()) if d not in self._axis], keepdim=True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # pytorch-quantization's version calls .cuda() and warns about every amax.
        nn.Module._load_from_state_dict(self, *args, **kwargs)
