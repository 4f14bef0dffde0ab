"""The quantizer: pytorch-quantization's TensorQuantizer with our formula and our calibration."""

from __future__ import annotations

import logging
from typing import Any

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
        self._window: tuple[tuple[int, int], float] | None = None
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
        amax = self._get_amax(inputs)
        return fake_quant.fake_quantize(inputs, amax, self.format, self._window_of(amax))

    def codes(self, inputs: Tensor, grad_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Integer codes (held in fp32) and the value of one step.

        A shared quantizer rounds a tensor once, however many layers ask for it, until `forget`.
        """
        amax = self._get_amax(inputs)
        step = fake_quant.step_of(amax, self.format)
        if self.is_shared and self._memo is not None and self._memo[0] is inputs:
            return self._memo[1], step
        codes = fake_quant.codes(inputs, amax, self.format, self._window_of(amax), grad_factor)
        if self.is_shared:
            self._memo = (inputs, codes)
        return codes, step

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

    def _window_of(self, amax: Tensor) -> float | None:
        """A per-tensor amax as a Python number, read from the device only when it has changed."""
        if not self.is_per_tensor or self.scheme.mode != "static" or not torch.is_grad_enabled():
            return None
        key = (amax.data_ptr(), amax._version)
        if self._window is None or self._window[0] != key:
            self._window = (key, float(amax))
        return self._window[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # pytorch-quantization's version calls .cuda() and warns about every amax.
        nn.Module._load_from_state_dict(self, *args, **kwargs)
