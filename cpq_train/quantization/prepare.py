"""From a float network to its quantized structure: fold BatchNorm, swap the layers, share quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from cpq_train.quantization.batchnorm import fold_batchnorm
from cpq_train.quantization.health import Problem, is_weight, refuse
from cpq_train.quantization.layers import QUANTIZED, quantize_layer, unquantize_layer
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme
from cpq_train.quantization.switches import quantized_layers, quantizers

RESIDUAL = ":residual"
"""In a group of consumers, `<name of a residual add>:residual` stands for the add's identity input."""


@dataclass
class Prepared:
    """What `prepare` made of a network.

    Args:
        layers: Name -> kind of every layer that can be quantized.
        schemes: Name -> what was chosen for it.
        shares_input_with: Name -> the first consumer whose input quantizer it shares.
        left_in_float: Names of the layers that `leave_in_float` took the quantizers out of.
        hook: What drops the codes of shared tensors behind each forward pass.
    """

    layers: dict[str, str]
    schemes: dict[str, LayerScheme]
    shares_input_with: dict[str, str] = field(default_factory=dict)
    left_in_float: list[str] = field(default_factory=list)
    hook: RemovableHandle | None = None


def prepare(
    network: nn.Module, scheme: Scheme, one_tensor: Iterable[Iterable[str]] = (), fold: bool = True
) -> Prepared:
    """Turn a float network into its quantized structure, in place.

    Weight ranges are set; activation ranges are NaN until they are calibrated or loaded.

    Args:
        network: Float layers with BatchNorm directly behind their convolution.
        scheme: What to quantize how.
        one_tensor: Groups of names whose layers read one tensor (`RESIDUAL` marks the identity of an add).
            Members with equal input settings share one quantizer, saved under every member's name.
        fold: Multiply BatchNorm into its convolution first.

    Raises:
        UserError: A rule of the scheme matches no layer, or nothing would be quantized.
    """
    layers = quantizable_layers(network)
    schemes = scheme.resolve(layers)
    if fold:
        fold_batchnorm(network)
    for name, layer_scheme in schemes.items():
        if not layer_scheme.is_float:
            quantize_layer(network.get_submodule(name), layer_scheme)
    prepared = Prepared(layers, schemes)
    for group in one_tensor:
        _share(network, [n for n in group if scheme.share_residual or not n.endswith(RESIDUAL)], prepared)
    prepared.hook = network.register_forward_hook(_forget_codes)
    return prepared


def remove_quantizers(network: nn.Module, prepared: Prepared) -> None:
    """Make what `prepare` made of a network a float one again, in place; BatchNorm stays as it is."""
    for layer in quantized_layers(network).values():
        unquantize_layer(layer)
    if prepared.hook is not None:
        prepared.hook.remove()


def leave_in_float(network: nn.Module, prepared: Prepared, scheme: Scheme, problems: list[Problem]) -> Scheme:
    """Take the quantizers out of the layers that read a tensor of unfit range, in place.

    Args:
        network: What `prepare` made.
        prepared: What it said; says afterwards what is left.
        scheme: What it was given.
        problems: The unfit ranges, of inputs only.

    Returns:
        The scheme that prepares the structure that is left.

    Raises:
        UserError: The range of a weight is unfit, or nothing would be left quantized.
    """
    refuse([problem for problem in problems if is_weight(problem.quantizer)])
    unfit = {network.get_submodule(problem.quantizer) for problem in problems}
    readers = [
        name
        for name, module in network.named_modules()
        if unfit & {getattr(module, "_input_quantizer", None), getattr(module, "_residual_quantizer", None)}
    ]
    scheme = scheme.with_float(readers)
    prepared.schemes = scheme.resolve(prepared.layers)
    for name in readers:
        unquantize_layer(network.get_submodule(name))
        for member in (name, name + RESIDUAL):
            prepared.shares_input_with.pop(member, None)
    prepared.left_in_float += readers
    return scheme


def unquantized(network: nn.Module) -> Prepared:
    """What `prepare` would say of a network that it left alone."""
    layers = quantizable_layers(network)
    off = QuantizerScheme(mode="off")
    return Prepared(layers, dict.fromkeys(layers, LayerScheme(off, off)))


def quantizable_layers(network: nn.Module) -> dict[str, str]:
    """Name -> kind of every layer that a scheme may speak of, in the order of the network."""
    return {n: type(m).__name__ for n, m in network.named_modules() if type(m) in QUANTIZED}


def _share(network: nn.Module, group: list[str], prepared: Prepared) -> None:
    """Give the members of a group with equal input settings one quantizer, that of the first of them."""
    first: dict[Any, str] = {}
    for member in group:
        name = member.removesuffix(RESIDUAL)
        chosen = prepared.schemes[name].input
        if chosen.is_off:
            continue
        if chosen not in first:
            first[chosen] = member
            continue
        shared = _input_quantizer(network, first[chosen])
        shared.is_shared = True
        attribute = "_residual_quantizer" if member.endswith(RESIDUAL) else "_input_quantizer"
        setattr(network.get_submodule(name), attribute, shared)
        prepared.shares_input_with[member] = first[chosen]


def _input_quantizer(network: nn.Module, member: str) -> Quantizer:
    return cast(Quantizer, network.get_submodule(member.removesuffix(RESIDUAL))._input_quantizer)


def _forget_codes(network: nn.Module, inputs: Any, output: Any) -> None:
    for quantizer in quantizers(network).values():
        quantizer.forget()


def coverage(prepared: Prepared) -> dict[str, tuple[int, int]]:
    """Kind -> (layers quantized, all layers); the two sparse kinds count as `sparse`."""
    counts: dict[str, tuple[int, int]] = {}
    for name, kind in prepared.layers.items():
        kind = "sparse" if kind in ("SubMConv3d", "SparseConv3d") else kind
        quantized, total = counts.get(kind, (0, 0))
        counts[kind] = (quantized + int(not prepared.schemes[name].is_float), total + 1)
    return counts
