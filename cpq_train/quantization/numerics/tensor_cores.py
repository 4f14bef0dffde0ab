"""Convolutions of codes on the tensor cores of a GPU, exact.

TF32, in which tensor cores multiply fp32 numbers, has 11 significant bits and so holds codes of 8 bits; they
add in fp32, which holds sums below 2^24. So it is switched on for codes, whatever PyTorch is set to; what
numbers get, gradients among them, PyTorch's settings decide.

cuDNN may choose a way that is not exact, as Winograd's is, whose transforms have fractions: not in
channels_last memory as far as is known. So the first sums of every shape are compared with fp64's, without
waiting for the answer; where they differ, fp64 computes that shape from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.common.late import Mailbox

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_seen: set[Hashable] = set()
_inexact: set[Hashable] = set()
_answers = Mailbox()


def exactly(convolve: Product, x: Tensor, weight: Tensor, geometry: Hashable) -> Tensor:
    """`convolve` of codes whose sums fp32 holds, without a gradient.

    Args:
        convolve: Linear in both.
        x: Codes, fp32.
        weight: Codes, fp32.
        geometry: What `convolve` depends on beside the shapes.
    """
    if torch.compiler.is_compiling() or are_numbers_at_hand(x.device):
        return convolve(x, weight)
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if not is_captured:
        _answers.take_arrived()
    key = geometry, x.shape, x.stride(), weight.shape, weight.stride(), x.device
    if key in _inexact:
        return convolve(x.double(), weight.double()).float()
    with tf32_convolutions():
        sums = convolve(x, weight)
    if key not in _seen and not is_captured:
        _seen.add(key)
        is_other = (convolve(x.double(), weight.double()) != sums).any()
        _answers.send(is_other, lambda answer: _note(key, bool(answer)))
    return sums


def _note(key: Hashable, is_other: bool) -> None:
    if is_other:
        _inexact.add(key)
        warnings.warn(
            f"cuDNN's sums of codes are not exact for {key}: some were rounded in a step before this one; "
            "from now on fp64 computes them",
            stacklevel=2,
        )


@contextmanager
def tf32_convolutions() -> Iterator[None]:
    """While open, cuDNN may convolve in TF32."""
    # From 2.9 on PyTorch has a setting for convolutions alone, and refuses a mixture with the older one.
    cudnn: Any = torch.backends.cudnn
    has_own = hasattr(cudnn, "conv")
    setting, name = (cudnn.conv, "fp32_precision") if has_own else (cudnn, "allow_tf32")
    before = getattr(setting, name)
    setattr(setting, name, "tf32" if has_own else True)
    try:
        yield
    finally:
        setattr(setting, name, before)
