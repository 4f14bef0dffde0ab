"""BatchNorm behind a convolution: folded into it, float or quantized, or frozen.

Folding multiplies the weight of output channel c by f_c = gamma_c / sqrt(var_c + eps). The range of a channel
scales with it, amax_c becoming amax_c * |f_c|, so that a quantized weight keeps its codes and a fold behind
training is exact as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers.kinds import kind_of
from cpq_train.quantization.numerics.fake_quant import round_to_codes
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import OUTPUT_CHANNEL_AXIS

BatchNormPolicy = Literal["folded", "frozen", "trained"]
"""folded: multiplied into the convolution before quantization. frozen: kept, statistics and factors as they
are. trained: kept and trained. What is kept is folded behind training."""


def fold_batchnorm(network: nn.Module, folds: Mapping[str, str]) -> None:
    """Multiply every BatchNorm into the layer whose output it reads, in place.

    Computed in fp64, stored in fp32. The BatchNorm becomes an Identity, the layer, float or quantized, gets a
    bias.

    Args:
        network: What `trace` saw.
        folds: Name of a BatchNorm -> its layer, as `Wiring.folds` has it; what is folded already stays.

    Raises:
        UserError: A quantized weight has one static range for several output channels: folded, it would
            round differently.
    """
    pairs = kept_batchnorms(network, folds)
    for norm, name in pairs.items():
        layer = network.get_submodule(name)
        if (quantizer := _weight_quantizer(layer)) is not None:
            check_fold(norm, name, layer, None if quantizer.is_per_tensor else quantizer._axis[0])
    for norm, name in pairs.items():
        _fold(network.get_submodule(name), cast(_BatchNorm, network.get_submodule(norm)))
        _remove(network, network.get_submodule(norm))


def check_fold(norm: str, name: str, layer: nn.Module, axis: int | None) -> None:
    """Whether BatchNorm can be folded into a layer whose weight is quantized.

    Args:
        norm: Name of the BatchNorm.
        name: Name of the layer.
        layer: The layer, float or quantized.
        axis: Of the weight, whose channels have a range each; None where there is one range.

    Raises:
        UserError: A range is that of several output channels.
    """
    per = "tensor" if axis is None else "input channel"
    if axis == _axis(layer):
        if not _shares_ranges_over_groups(layer):
            return
        per = "channel of every group alike"
    raise UserError(
        f"{name}: its weight is quantized per {per}, and {norm} folded into it would change its codes; "
        "accepted: granularity per_channel, without groups in a ConvTranspose2d, or BatchNorm folded before "
        "(model.batchnorm folded; prepare(..., fold=True))"
    )


def kept_batchnorms(network: nn.Module, folds: Mapping[str, str]) -> dict[str, str]:
    """Those of `folds` that are still there: name of the BatchNorm -> its layer."""
    return {n: layer for n, layer in folds.items() if isinstance(network.get_submodule(n), _BatchNorm)}


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


def _remove(network: nn.Module, norm: nn.Module) -> None:
    """Put an Identity in the place of a module, under all its names."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # named_children has each but once
            if child is norm:
                setattr(parent, name, nn.Identity())


def _axis(layer: nn.Module) -> int:
    return OUTPUT_CHANNEL_AXIS[str(kind_of(layer))]


def _shares_ranges_over_groups(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1


def _weight_quantizer(conv: nn.Module) -> Quantizer | None:
    return cast(Quantizer | None, getattr(conv, "_weight_quantizer", None))


@torch.no_grad()
def _fold(conv: Any, bn: _BatchNorm) -> None:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    mean, var = bn.running_mean.double(), bn.running_var.double()
    factor = (torch.ones_like(var) if bn.weight is None else bn.weight.double()) / torch.sqrt(var + bn.eps)
    beta = torch.zeros_like(var) if bn.bias is None else bn.bias.double()
    per_channel = _like_weight(conv, factor)
    bias = torch.zeros_like(factor) if conv.bias is None else conv.bias.double()
    weight, quantizer = conv.weight.double(), _weight_quantizer(conv)
    if quantizer is not None:
        weight = _values(weight, quantizer, per_channel)
        quantizer.scale_amax(per_channel.abs())
    conv.weight.copy_(weight * per_channel)
    trains = any(p is not None and p.requires_grad for p in (conv.weight, conv.bias, bn.weight, bn.bias))
    conv.bias = nn.Parameter((beta + (bias - mean) * factor).to(conv.weight.dtype), requires_grad=trains)


def _like_weight(layer: Any, per_output: Tensor) -> Tensor:
    """Numbers (C',) of the output channels, broadcastable to the weight of their layer."""
    rest = [1] * (layer.weight.dim() - 2)
    if _shares_ranges_over_groups(layer):  # (C, C' / groups, ...): a group's rows have its channels
        return (
            per_output.view(layer.groups, -1)
            .repeat_interleave(len(layer.weight) // layer.groups, 0)
            .view(len(layer.weight), -1, *rest)
        )
    return per_output.view((1, -1, *rest) if _axis(layer) == 1 else (-1, 1, *rest))


def _values(weight: Tensor, quantizer: Quantizer, factor: Tensor) -> Tensor:
    """The values of a weight's codes: unlike the weight they are far from where rounding changes its mind."""
    fmt, chosen = quantizer.format, quantizer.range_of(weight.float())
    codes = round_to_codes(weight.float(), chosen.scale, fmt)
    # A negative factor mirrors the codes, and two's complement has no mirror of its smallest one.
    codes = torch.where(factor < 0, codes.clamp(min=-fmt.qmax), codes)
    return codes.double() * chosen.step.double()
