"""The networks that qat_overhead.py compares: one set of weights, BatchNorm folded, as three training steps.

float    no quantizers.
qat      this package's quantized layers, as a scheme says.
pq       pytorch-quantization's own QuantConv2d and QuantConvTranspose2d, and its TensorQuantizer on features
         and weight around the sparse convolutions and the residual adds, as NVIDIA's CUDA-CenterPoint
         has it; on the layers that the scheme quantizes, with the ranges of qat.

Letters: V active voxels, C channels.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from pytorch_quantization import tensor_quant
from pytorch_quantization.nn import QuantConv2d, QuantConvTranspose2d, TensorQuantizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.data.dataset import Batch
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import fold_batchnorm
from cpq_train.quantization.layers import QuantAdd
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import OUTPUT_CHANNEL_AXIS, Scheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SparseModule, SubMConv3d


def build_arms(config: NetworkConfig, scheme: Scheme, batch: Batch) -> dict[str, CenterPoint]:
    """Build float, qat and pq networks that compute the same function up to rounding.

    Args:
        config: Sizes of the network.
        scheme: What to quantize.
        batch: Gives BatchNorm its statistics and the quantizers their ranges, so that activations have
            the sizes of a trained network's.
    """
    original = CenterPoint(config)
    _draw_weights(original)  # before it moves: the same weights on every device
    original.to(batch["voxel_features"].device)
    _settle_batchnorm(original, batch)
    arms = {name: copy.deepcopy(original) for name in ("float", "qat", "pq")}
    prepared = prepare(arms["qat"], scheme, original.example_input())
    fold_batchnorm(arms["float"], prepared.folds)
    fold_batchnorm(arms["pq"], prepared.folds)
    with collecting_ranges(arms["qat"]):
        run(arms["qat"], batch)
    _to_pytorch_quantization(arms["pq"], like=arms["qat"])
    for network in arms.values():
        network.train()
        for dense in (network.backbone_2d, network.dense_head):
            dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return arms


def run(network: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Forward pass of a batch."""
    heads: list[dict[str, Tensor]] = network(
        batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]
    )
    return heads


def _draw_weights(network: CenterPoint) -> None:
    """Normal weights, as trained ones roughly are: the default uniform ones have twice as large codes.

    On the size of the codes depends whether a layer has to split its sum to keep it exact.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, SubMConv3d, SparseConv3d)):
            fan_in = module.weight.numel() // module.out_channels
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)


def _settle_batchnorm(network: CenterPoint, batch: Batch) -> None:
    """Set the running statistics to those of one batch."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        run(network.train(), batch)


def _to_pytorch_quantization(network: nn.Module, like: nn.Module) -> None:
    """Replace the layers that `like` has quantized; both have the same names."""
    for name, ours in list(like.named_modules()):
        weight_quantizer = getattr(ours, "_weight_quantizer", None)
        if weight_quantizer is None and not isinstance(ours, QuantAdd):
            continue
        layer = network.get_submodule(name)
        theirs = _quantized(layer)
        theirs._input_quantizer.register_buffer("_amax", cast(Any, ours)._input_quantizer.amax.clone())
        if weight_quantizer is not None:
            axis = theirs._weight_quantizer.axis
            axis = axis[0] if isinstance(axis, tuple) else axis
            dims = [d for d in range(theirs.weight.dim()) if d != axis]
            amax = theirs.weight.detach().abs().amax(dims, keepdim=True)
            theirs._weight_quantizer.register_buffer("_amax", amax)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, theirs)


def _quantized(layer: nn.Module) -> Any:
    if isinstance(layer, nn.Conv2d):
        return _take_parameters(QuantConv2d(*_sizes(layer), padding=layer.padding), layer)
    if isinstance(layer, nn.ConvTranspose2d):
        return _take_parameters(QuantConvTranspose2d(*_sizes(layer)), layer)
    if isinstance(layer, (SubMConv3d, SparseConv3d)):
        return TheirSparseConvolution(layer)
    assert isinstance(layer, ResidualAdd)
    return TheirResidualAdd()


def _sizes(layer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[Any, ...]:
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride


def _take_parameters(quantized: Any, layer: Any) -> Any:
    quantized.weight, quantized.bias = layer.weight, layer.bias
    return quantized


class TheirSparseConvolution(SparseModule):  # type: ignore[misc]  # spconv ships no types
    """A sparse convolution with a TensorQuantizer on its features and one on its weight."""

    def __init__(self, convolution: SubMConv3d | SparseConv3d) -> None:
        super().__init__()
        axis = OUTPUT_CHANNEL_AXIS[type(convolution).__name__]
        self.convolution = convolution
        self._input_quantizer = TensorQuantizer(tensor_quant.QUANT_DESC_8BIT_PER_TENSOR)
        self._weight_quantizer = TensorQuantizer(tensor_quant.QuantDescriptor(axis=(axis,)))

    @property
    def weight(self) -> Tensor:
        """KRSC weight."""
        return self.convolution.weight

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Sparse tensor in, sparse tensor out."""
        x = x.replace_feature(self._input_quantizer(x.features))
        out = self.convolution.convolve(x, self._weight_quantizer(self.weight))
        return out.replace_feature(out.features + self.convolution.bias)


class TheirResidualAdd(nn.Module):
    """A residual add whose two inputs go through one TensorQuantizer."""

    def __init__(self) -> None:
        super().__init__()
        self._input_quantizer = TensorQuantizer(tensor_quant.QUANT_DESC_8BIT_PER_TENSOR)

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """(V, C) + (V, C)."""
        return torch.add(self._input_quantizer(branch), self._input_quantizer(identity))
