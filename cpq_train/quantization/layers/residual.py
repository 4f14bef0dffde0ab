"""The residual add."""

from __future__ import annotations

from torch import Tensor, nn

from cpq_train.quantization.numerics.fake_quant import add_codes
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
        (a, step_a), (b, step_b) = (quantizer.codes(tensor) for quantizer, tensor in pairs)
        return add_codes(a, step_a, b, step_b)
