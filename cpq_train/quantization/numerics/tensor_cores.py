"""Convolutions of codes on the tensor cores of a GPU, exact.

TF32, in which tensor cores multiply fp32 numbers, has 11 significant bits and so holds codes of 8 bits; they
add in fp32, which holds sums below 2^24. So it is switched on for codes, whatever PyTorch is set to; what
numbers get, gradients among them, PyTorch's settings decide.

cuDNN may choose a way that is not exact, as Winograd's is, whose transforms have fractions: not in
channels_last memory as far as is known. So the first sums of every shape are compared with fp64's, without
waiting for the answer; where they differ, fp64 computes that shape from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.common.proofs import Proofs

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_proofs = Proofs("cuDNN's sums of codes")


def exactly(convolve: Product, x: Tensor, weight: Tensor, geometry: Hashable) -> Tensor:
    """`convolve` of codes whose sums fp32 holds, without a gradient.

    Args:
        convolve: Linear in both.
        x: Codes, fp32.
        weight: Codes, fp32.
        geometry: What `convolve` depends on beside the shapes.
    """
    if are_numbers_at_hand(x.device) or torch.compiler.is_compiling():
        return convolve(x, weight)
    way = geometry, x.shape, x.stride(), weight.shape, weight.stride(), x.device
    if not _proofs.trusts(way):
        return convolve(x.double(), weight.double()).float()
    with _Tf32():
        sums = convolve(x, weight)
    _proofs.look(way, sums, lambda: convolve(x.double(), weight.double()))
    return sums


class _Tf32:
    """While open, cuDNN may convolve in TF32; a class, because every layer opens it."""

    # From 2.9 on PyTorch has a setting for convolutions alone, and refuses a mixture with the older one.
    _cudnn: Any = torch.backends.cudnn
    _has_own = hasattr(_cudnn, "conv")
    _setting, _name = (_cudnn.conv, "fp32_precision") if _has_own else (_cudnn, "allow_tf32")
    _value: str | bool = "tf32" if _has_own else True

    def __enter__(self) -> None:
        self._before = getattr(self._setting, self._name)
        if self._before != self._value:
            setattr(self._setting, self._name, self._value)

    def __exit__(self, *_: object) -> None:
        if self._before != self._value:
            setattr(self._setting, self._name, self._before)
