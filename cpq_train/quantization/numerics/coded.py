"""A tensor as the readers of one quantizer have it: its codes, and where their gradients go.

The gradient of codes is by convention that of the values they stand for. `Coded.source` passes it on to the
tensor where that is inside its range, once for all readers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from cpq_train.quantization.numerics import one_pass
from cpq_train.quantization.numerics.device.operators import operators
from cpq_train.quantization.numerics.fake_quant import round_to_codes
from cpq_train.quantization.numerics.formats import IntegerFormat, NumberFormat


class Coded(NamedTuple):
    """Codes of a tensor.

    Attributes:
        source: Takes the gradient of the values that the codes stand for; of the shape of the tensor, its
            numbers need not be the tensor's.
        codes: u8, or fp32 where a code is negative, wide or no number, and on a GPU; without a gradient.
        are_signed: Whether a code may be negative, as far as is known.
        has_numbers: Whether `source` has those of the tensor.
    """

    source: Tensor
    codes: Tensor
    are_signed: bool = True
    has_numbers: bool = True

    @property
    def are_bytes(self) -> bool:
        """Whether the codes are held in bytes."""
        return self.codes.dtype == torch.uint8

    def in_fp32(self) -> Tensor:
        """The codes in fp32, with their gradient."""
        return cast(Tensor, _WithGradient.apply(self.source, self.codes))


class _WithGradient(Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, codes: Tensor) -> Tensor:
        return codes.float() if codes.dtype == torch.uint8 else codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def codes_of(x: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """See `Coded.codes`."""
    x = x.detach()
    if isinstance(fmt, IntegerFormat) and scale.numel() == 1 and one_pass.is_fit(x):
        if one_pass.are_operators_for(x):
            return cast(Tensor, operators.encode(x, scale, float(fmt.qmin), float(fmt.qmax)))
        codes = one_pass.encoded(x, scale, fmt) if one_pass.has_byte_codes(fmt) else None
        if codes is not None:
            return codes
    return round_to_codes(x, scale, fmt)
