"""BatchNorm behind a convolution: folded into it, float or quantized, or frozen.

Folding multiplies the weight of output channel c by f_c = gamma_c / sqrt(var_c + eps). The range of a channel
scales with it, amax_c becoming amax_c * |f_c|, so that a quantized weight keeps its codes and a fold behind
training is exact as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.common.errors import UserError
from cpq_train.quantization.numerics.fake_quant import round_to_codes
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import OUTPUT_CHANNEL_AXIS

BatchNormPolicy = Literal["folded", "frozen", "trained"]
"""folded: multiplied into the convolution before quantization. frozen: kept, statistics and factors as they
are. trained: kept and trained. What is kept is folded behind training."""


def fold_batchnorm(network: nn.Module) -> None:
    """Multiply every BatchNorm into the convolution registered directly before it, in place.

    Computed in fp64, stored in fp32. Covers sparse, Conv2d and ConvTranspose2d layers, float or quantized.
    The BatchNorm becomes an Identity, the convolution gets a bias.

    Raises:
        UserError: A quantized weight has one static range for several output channels: folded, it would
            round differently.
    """
    pairs = list(followed_by_batchnorm(network))
    for name, _, conv, _ in pairs:
        _check_folds(name, conv)
    for _, parent, conv, bn_name in pairs:
        _fold(conv, cast(_BatchNorm, getattr(parent, bn_name)))
        setattr(parent, bn_name, nn.Identity())


def freeze_batchnorm(network: nn.Module) -> None:
    """Keep statistics and factors of every BatchNorm as they are, in training too."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)


def trains_on_parts_of_a_batch(network: nn.Module) -> bool:
    """Whether a BatchNorm takes its statistics from one rank's samples alone."""
    return any(
        isinstance(m, _BatchNorm) and m.training and not isinstance(m, nn.SyncBatchNorm)
        for m in network.modules()
    )


def joins_batches_of_ranks(network: nn.Module) -> bool:
    """Whether a BatchNorm takes its statistics from the samples of all ranks."""
    return any(isinstance(m, nn.SyncBatchNorm) and m.training for m in network.modules())


def followed_by_batchnorm(network: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """Name, parent, convolution and the BatchNorm's name in the parent, for every such pair."""
    for parent_name, parent in network.named_modules():
        for (name, conv), (bn_name, bn) in pairwise(list(parent.named_children())):
            if _kind(conv) in OUTPUT_CHANNEL_AXIS and isinstance(bn, _BatchNorm):
                yield f"{parent_name}.{name}".lstrip("."), parent, conv, bn_name


def _kind(conv: nn.Module) -> str:
    return str(getattr(conv, "kind", type(conv).__name__))


def _weight_quantizer(conv: nn.Module) -> Quantizer | None:
    return cast(Quantizer | None, getattr(conv, "_weight_quantizer", None))


def _check_folds(name: str, conv: nn.Module) -> None:
    quantizer = _weight_quantizer(conv)
    if quantizer is not None and quantizer._axis != (OUTPUT_CHANNEL_AXIS[_kind(conv)],):
        per = "tensor" if quantizer.is_per_tensor else "input channel"
        raise UserError(
            f"{name}: its weight is quantized per {per}, and a BatchNorm folded into it would change its "
            "codes; accepted: granularity per_channel, or model.batchnorm folded from the start"
        )


@torch.no_grad()
def _fold(conv: Any, bn: _BatchNorm) -> None:
    gamma, beta, mean, var = (
        cast(Tensor, t).double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    factor = gamma / torch.sqrt(var + bn.eps)
    axis = OUTPUT_CHANNEL_AXIS[_kind(conv)]
    per_channel = factor.view([-1 if d == axis else 1 for d in range(conv.weight.dim())])
    bias = torch.zeros_like(factor) if conv.bias is None else conv.bias.double()
    weight, quantizer = conv.weight.double(), _weight_quantizer(conv)
    if quantizer is not None:
        weight = _values(weight, quantizer, per_channel)
        quantizer.scale_amax(per_channel.abs())
    conv.weight.copy_(weight * per_channel)
    conv.bias = nn.Parameter((beta + (bias - mean) * factor).to(conv.weight.dtype))


def _values(weight: Tensor, quantizer: Quantizer, factor: Tensor) -> Tensor:
    """The values of a weight's codes: unlike the weight they are far from where rounding changes its mind."""
    fmt, chosen = quantizer.format, quantizer.range_of(weight.float())
    codes = round_to_codes(weight.float(), chosen.scale, fmt)
    # A negative factor mirrors the codes, and two's complement has no mirror of its smallest one.
    codes = torch.where(factor < 0, codes.clamp(min=-fmt.qmax), codes)
    return codes.double() * chosen.step.double()
