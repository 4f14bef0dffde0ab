"""The residual add."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.fake_quant import add_codes
from cpq_train.quantization.numerics.masks import INSIDE
from cpq_train.quantization.numerics.one_pass import Scalars, added, is_fit, passed
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme
from cpq_train.sparse import ResidualAdd


class QuantAdd(ResidualAdd):
    """The residual add of two quantized tensors: codes_a * step_a + codes_b * step_b.

    `_input_quantizer` rounds the branch; the identity goes through `_residual_quantizer` where it shares the
    range of the block's input (`Scheme.share_residual`), else through `_input_quantizer` too.
    """

    kind = "ResidualAdd"
    is_bypassed = False

    float_class: type[nn.Module]
    why_simulated: str
    _input_quantizer: Quantizer
    _residual_quantizer: Quantizer | None

    def attach(self, scheme: LayerScheme) -> None:
        """Create the quantizer."""
        self.why_simulated = scheme.why_simulated
        self._input_quantizer = Quantizer(scheme.input)
        self._residual_quantizer = None

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """(V, C) + (V, C), or others that broadcast."""
        residual = self._residual_quantizer or self._input_quantizer
        pairs = ((self._input_quantizer, branch), (residual, identity))
        for quantizer, tensor in pairs:
            if quantizer._if_calib:
                quantizer.collect(tensor)
        if self.is_bypassed or not self._input_quantizer.is_active:
            return super().forward(branch, identity)
        if self.why_simulated:
            return super().forward(*(quantizer(tensor) for quantizer, tensor in pairs))
        step_a, step_b = (quantizer.range_of(tensor).step for quantizer, tensor in pairs)
        b = residual.coded(identity)
        if (scalars := self._in_one_pass(branch, b)) is not None:
            return cast(Tensor, _AddRounded.apply(branch, b.source, b.codes, step_b, scalars))
        return add_codes(self._input_quantizer.coded(branch).in_fp32(), step_a, b.in_fp32(), step_b)

    def _in_one_pass(self, branch: Tensor, identity: Coded) -> Scalars | None:
        """The range of the branch where rounding and sum can be one pass; None where they are several."""
        codes = identity.codes
        if branch.shape != codes.shape or branch.stride() != codes.stride() or not is_fit(branch):
            return None
        scalars = None if self._input_quantizer.is_shared else self._input_quantizer.scalars()
        return None if scalars is None or scalars.log_amax is not None else scalars


class _AddRounded(Function):
    """`code(branch) * step + codes * step`, rounded as `add_codes` does."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, source: Tensor, codes: Tensor, step: Tensor, by: Scalars) -> Tensor:
        y, mask = added(branch, by, codes, step, has_gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return None if mask is None else passed(grad, mask, INSIDE), grad, None, None, None
