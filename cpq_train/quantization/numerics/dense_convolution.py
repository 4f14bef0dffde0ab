"""A dense convolution of two given tensors, and its gradients.

Letters: B batch, C C' input and output channels; `...` one to three axes of space. B may be missing, as it
may in PyTorch's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from cpq_train.quantization.numerics.int8_kernel import Geometry

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


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
        """(B, C, ...) -> (B, C', ...)."""
        out = torch.convolution(self._laid_out(x, weight), weight, None, *self.geometry)
        return out if x.dim() == weight.dim() else out.squeeze(0)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        num_biases: list[int] | None,
        needed: tuple[bool, bool, bool],
    ) -> Gradients:
        """Gradients of input, weight and bias, of each that is needed."""
        is_batch = x.dim() == weight.dim()
        grad_x, grad_w, grad_bias = torch.ops.aten.convolution_backward(
            *(grad if is_batch else grad.unsqueeze(0), self._laid_out(x, weight), weight),
            *(num_biases, *self.geometry, needed),
        )
        if grad_x is not None:
            for axis, more in enumerate(self.more_behind, 2):
                grad_x = grad_x.narrow(axis, 0, grad_x.shape[axis] - more)
            grad_x = grad_x if is_batch else grad_x.squeeze(0)
        return grad_x, grad_w, grad_bias

    def _laid_out(self, x: Tensor, weight: Tensor) -> Tensor:
        """With B, and with the zeros that torch.convolution does not add."""
        x = x if x.dim() == weight.dim() else x.unsqueeze(0)
        if not self.more_behind:
            return x
        return functional.pad(x, [number for more in reversed(self.more_behind) for number in (0, more)])
