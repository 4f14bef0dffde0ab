"""A sparse convolution of numbers by our kernels, as one autograd node."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cpq_train.sparse.kernels import convolutions
from cpq_train.sparse.kernels.convolutions import PairLists


def convolve(features: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
    """(V', C') of fp32 features (V, C) and a KRSC weight, differentiable in both."""
    return cast(Tensor, _Convolution.apply(features, weight, lists))


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
        ctx.lists = lists
        ctx.save_for_backward(features, weight, lists.rows_in, lists.rows_out)
        return convolutions.convolve(features, weight, lists)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight, *_ = ctx.saved_tensors
        needs_x, needs_w, _ = ctx.needs_input_grad
        grad_x = convolutions.input_gradient(grad, weight, ctx.lists) if needs_x else None
        grad_w = convolutions.weight_gradient(features, grad, ctx.lists).view_as(weight) if needs_w else None
        return grad_x, grad_w, None
