"""What a layer costs: bytes of its weights, and multiply-accumulates weighted by bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.sparse import SparseConv3d, SparseInverseConv3d, SubMConv3d
from cpq_train.sparse.rulebook import count_pairs

FLOAT_BITS = 32
BITS_PER_MIB = 8 * 2**20


class LayerCost(NamedTuple):
    """Size of a layer; a residual add has neither weights nor products.

    Attributes:
        num_weights: Without bias and scales, which no scheme changes.
        num_macs: Multiply-accumulates per sample; those of a sparse layer depend on its voxels.
    """

    num_weights: int
    num_macs: float


def stored_mib(cost: LayerCost, scheme: LayerScheme) -> float:
    """MiB of the weights at the bits they are stored with; float ones have 32."""
    return cost.num_weights * _bits(scheme.weight) / BITS_PER_MIB


def bit_macs(cost: LayerCost, scheme: LayerScheme) -> float:
    """MACs * bits of the weight * bits of the input; a float tensor counts 32.

    Source: "bit operations" of Baskin et al., UNIQ, 2018 (https://arxiv.org/abs/1804.10969), without the
    bits of the accumulator.
    """
    return cost.num_macs * _bits(scheme.weight) * _bits(scheme.input)


def _bits(scheme: QuantizerScheme) -> int:
    return FLOAT_BITS if scheme.is_off else scheme.bits


def count_costs(network: nn.Module, layers: Iterable[str], run: Callable[[], int]) -> dict[str, LayerCost]:
    """Count weights, and MACs while samples pass.

    Args:
        network: Float or quantized.
        layers: Names of convolutions and residual adds.
        run: Passes samples through the network and returns how many.

    Returns:
        Name -> cost.
    """
    modules = {name: network.get_submodule(name) for name in layers}
    macs = dict.fromkeys(modules, 0)

    def count(module: nn.Module, inputs: Any, by_name: Any, output: Any, *, name: str) -> None:
        macs[name] += num_macs(module, inputs or tuple(by_name.values()), output)

    handles = [
        m.register_forward_hook(partial(count, name=name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        num_samples = run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: LayerCost(_num_weights(m), macs[name] / num_samples) for name, m in modules.items()}


def _num_weights(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return 0 if weight is None else int(weight.numel())


def num_macs(module: Any, inputs: Any, output: Any) -> int:
    """Multiply-accumulates of one call of a layer; 0 for layers without products, as normalisation.

    Args:
        module: Any layer; convolutions, sparse ones too, and Linear have products.
        inputs: What it was called with.
        output: What it returned.
    """
    if isinstance(module, (SubMConv3d, SparseConv3d, SparseInverseConv3d)):
        return count_pairs(module, inputs[0]) * int(module.in_channels * module.out_channels)
    if isinstance(module, _ConvTransposeNd):  # every weight meets every input position
        return int(inputs[0].numel() // module.in_channels * module.weight.numel())
    if isinstance(module, _ConvNd):  # every weight meets every output position
        return int(output.numel() // module.out_channels * module.weight.numel())
    if isinstance(module, nn.Linear):
        return int(output.numel() // module.out_features * module.weight.numel())
    return 0
