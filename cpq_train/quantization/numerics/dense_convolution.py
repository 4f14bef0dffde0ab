"""A dense convolution of two given tensors, and its gradients.

Letters: B batch, C C' input and output channels; `...` one to three axes of space. B may be missing, as it
may in PyTorch's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from cpq_train.quantization.numerics import blocks
from cpq_train.quantization.numerics.int8_kernel import OF_A_PIXEL, Geometry
from cpq_train.quantization.numerics.tensor_cores import exactly

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias, of each that is needed."""


class Backward(NamedTuple):
    """What the gradients of a convolution are made from.

    Attributes:
        grad: Of its output.
        x: Its input; codes may be bytes.
        weight: Float.
        num_biases: Shape of the bias, or None.
        needed: Whether gradients of input, weight and bias are.
        dtype: Computes them, if it can.
    """

    grad: Tensor
    x: Tensor
    weight: Tensor
    num_biases: list[int] | None
    needed: tuple[bool, bool, bool]
    dtype: torch.dtype


@dataclass(frozen=True)
class DenseConvolution:
    """The convolution of a torch.nn layer, without its weight and bias.

    Attributes:
        geometry: Of it.
        more_behind: Zeros that each axis has at its end beyond the padding; empty where none has any.
    """

    geometry: Geometry
    more_behind: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Any, output_padding: tuple[int, ...]) -> DenseConvolution:
        """That of a layer; `output_padding` is that of the call, which may ask for a size."""
        padding, more_behind = layer.padding, ()
        if isinstance(padding, str):
            factor = int(padding == "same")  # 0: valid
            span = [factor * d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            # Of an odd number of zeros one more is at the end, as PyTorch pads.
            padding, more_behind = tuple(s // 2 for s in span), tuple(s % 2 for s in span)
        geometry = Geometry(
            layer.stride, padding, layer.dilation, layer.transposed, output_padding, layer.groups
        )
        return cls(geometry, more_behind if any(more_behind) else ())

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C', ...), or both without B."""
        if x.dim() < weight.dim():
            return self(x.unsqueeze(0), weight).squeeze(0)
        return torch.convolution(self._padded(x), weight, None, *self.geometry)

    def of_codes(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same of codes whose sums fp32 holds, exact, without a gradient."""
        return exactly(self, x, weight, self)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Tensors that `gradients` needs beside what it is given: none."""
        return ()

    def gradients(self, of: Backward) -> Gradients:
        """Gradients in fp32, computed in the type asked for; the input is (B, C, ...)."""
        grad, x, weight, num_biases, needed, dtype = of
        are_apart = blocks.are_apart(self.geometry, weight)
        geometry, shape = self.geometry, weight.shape
        if are_apart:
            geometry, weight = OF_A_PIXEL, blocks.pixel_weight(weight)
            grad = blocks.gathered(grad, *shape[2:])
            num_biases = None if num_biases is None else [len(weight)]
        tensors = (tensor.to(dtype) for tensor in (grad, self._padded(x), weight))
        found = torch.ops.aten.convolution_backward(*tensors, num_biases, *geometry, needed)
        grad_x, grad_w, grad_bias = (None if one is None else one.float() for one in found)
        if are_apart:
            grad_w = None if grad_w is None else blocks.block_weight(grad_w, shape)
            grad_bias = None if grad_bias is None else grad_bias.view(-1, shape[1]).sum(0)
        if grad_x is not None and self.more_behind:
            grad_x = grad_x[(..., *map(slice, x.shape[2:]))]
        return grad_x, grad_w, grad_bias

    def _padded(self, x: Tensor) -> Tensor:
        """With the zeros that torch.convolution does not add."""
        if not self.more_behind:
            return x
        return functional.pad(x, [number for more in reversed(self.more_behind) for number in (0, more)])
