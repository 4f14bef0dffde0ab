"""ReLUs that make the codes of their output, for the quantizer that reads it.

Which quantizer that is, a ReLU learns from the first pass: it says which use of it made its output
(`Scope.note_maker`), and the quantizer that codes it answers (`Scope.note_reader`). From then on the ReLU and
the codes are one pass, and what is kept for backward is a byte of mask instead of the output, which the codes
stand for. Whoever else reads the output reads the numbers that a ReLU gives, with a ReLU's gradient.

The gradient of codes passes the output by. Who wants it there, as for `torch.autograd.grad`, has to say so
before the codes are read, by `retain_grad` or a hook of the tensor.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.masks import INSIDE, POSITIVE
from cpq_train.quantization.numerics.one_pass import Rectified, Scalars, is_fit, learned, passed, rectified
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scope import Scope, are_saved_tensors_hooked, modes_of


class CodingReLU(nn.ReLU):
    """A ReLU of a prepared network."""

    scope: Scope

    def forward(self, input: Tensor) -> Tensor:
        """max(0, x), any shape."""
        if torch.compiler.is_compiling() or not self.scope.is_in_forward:
            return super().forward(input)
        use = self.scope.next_use(self)
        values = self._with_codes(input, self.scope.reader_of.get(use))
        if values is None:
            values = super().forward(input)
        self.scope.note_maker(values, use)
        return values

    def _with_codes(self, x: Tensor, reader: Quantizer | None) -> Tensor | None:
        """The output, its codes at hand for its reader; None where there is none, or it is for PyTorch."""
        if reader is None or not is_fit(x):
            return None
        has_gradient = torch.is_grad_enabled() and x.requires_grad
        scalars = reader.scalars()
        if scalars is None or (has_gradient and are_saved_tensors_hooked()):
            return None
        is_learned = scalars.log_amax is not None
        is_counted = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with is_counted:  # of a tensor of inference mode nobody counts who writes to it
            made = rectified(x.detach(), scalars, has_gradient and not is_learned)
        if made is None:
            return None
        values, source = made.values, made.values
        if has_gradient and is_learned:
            values, source = _RectifiedAndLearned.apply(x, scalars.log_amax, made.values, scalars)
        elif has_gradient:
            values, source = _Rectified.apply(x, made)
        coded = Coded(source, made.codes, are_signed=False, has_numbers=not has_gradient)
        self.scope.codes.put(reader, values, coded, reader.num_readers, modes_of(values))
        return values


class _Rectified(Function):
    """Output of a ReLU, and the source of its codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Rectified) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(made.mask)
        return made.values, made.values.new_empty(()).expand_as(made.values)  # of its shape, without its size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_values: Tensor | None, of_codes: Tensor | None) -> tuple[Tensor | None, None]:
        (mask,) = ctx.saved_tensors
        grads = [
            passed(grad, mask, cast(Any, bits))
            for grad, bits in ((of_codes, POSITIVE | INSIDE), (of_values, POSITIVE))
            if grad is not None
        ]
        return sum(grads[1:], grads[0]) if grads else None, None


class _RectifiedAndLearned(Function):
    """The same, whose codes have a range that is learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_amax: Tensor, values: Tensor, by: Scalars) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.by = by
        ctx.save_for_backward(values)
        return values, values.new_empty(()).expand_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_values: Tensor | None, of_codes: Tensor | None) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        grad, of_log = None, None
        if of_codes is not None:
            grad, of_log = learned(of_codes, values, ctx.by, is_rectified=True)
        if of_values is not None:
            through = torch.ops.aten.threshold_backward(of_values, values, 0)
            grad = through if grad is None else grad + through
        return grad, of_log, None, None


def make_coding(network: nn.Module, scope: Scope) -> None:
    """Let the ReLUs of a network make codes, in place; those that write into their input stay as they are."""
    for module in network.modules():
        if type(module) is nn.ReLU and not module.inplace:
            module.__class__ = CodingReLU
            cast(CodingReLU, module).scope = scope


def make_plain(network: nn.Module) -> None:
    """The other way round."""
    for module in network.modules():
        if isinstance(module, CodingReLU):
            del module.scope
            cast(nn.Module, module).__class__ = nn.ReLU
