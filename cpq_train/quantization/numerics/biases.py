"""Biases as engines have them.

Kernels of 8 bits add a bias to their sum of products, as a whole multiple of the step of that sum:

    code = round_half_even(bias / (step_x * step_w));    y = (acc + code) * (step_x * step_w)

A network that trains with such biases (`accumulator`) is what these kernels compute; libspconv has them in
half precision (`fp16`). The gradient of a bias is that of the float one.

A code is an fp32 number: a whole one, of 24 significant bits. So the sum of an exact fp32 `acc` and a code is
rounded once, however large the code is.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

from torch import Tensor
from torch.autograd import Function

BiasKind = Literal["float", "accumulator", "fp16"]

LARGEST_BIAS_CODE = 2**30
"""A sum of 32 bits has as much room again for 66,000 products of 8-bit codes."""

FITTED_BIAS_CODE = 2**28
"""What a widened step makes of a bias that was too large: it may grow fourfold in training."""

STEP_OF_ZERO_CHANNEL = 2.0**-16
"""Of a weight whose channel is all zero. Any step serves its codes, but its bias has to lie on a fine grid:
the step of 1 that is usual would round it to whole input steps."""


class Bias(NamedTuple):
    """A bias on its way into a layer's output.

    Attributes:
        values: (C',) what is added to the scaled sum, unless there are codes; has the gradient. None where
            there is no bias.
        codes: (C',) whole numbers that are added to the sum, or None.
    """

    values: Tensor | None
    codes: Tensor | None = None

    @property
    def is_in_sum(self) -> bool:
        """Whether the codes stand for it."""
        return self.codes is not None


def bias_codes(bias: Tensor, unit: Tensor) -> Tensor:
    """The whole multiples of a unit nearest to a bias, held in fp32; beyond 2^30 they saturate.

    Args:
        bias: (C',).
        unit: step_x * step_w, (C',) or one number.
    """
    codes = (bias.detach().double() / unit.double()).round_()
    return codes.clamp_(-LARGEST_BIAS_CODE, LARGEST_BIAS_CODE).float()


def rounded_to_half(bias: Tensor) -> Tensor:
    """The fp16 numbers nearest to a bias, held in fp32, with the gradient of the bias."""
    return cast(Tensor, _HalfPrecision.apply(bias))


class _HalfPrecision(Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return bias.half().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def as_deployed(bias: Tensor | None, kind: BiasKind, unit: Tensor) -> Bias:
    """A bias as its kind has it.

    Args:
        bias: (C',) the parameter, or None.
        kind: Of it.
        unit: Value of 1 in the layer's sums, (C',) or one number.
    """
    if bias is None or kind == "float":
        return Bias(bias)
    if kind == "fp16":
        return Bias(rounded_to_half(bias))
    return Bias(bias, bias_codes(bias, unit))
