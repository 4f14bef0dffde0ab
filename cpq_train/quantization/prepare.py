"""From a float network to its quantized structure: fold BatchNorm, swap the layers, share quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.common.errors import UserError
from cpq_train.quantization.batchnorm import check_fold, fold_batchnorm
from cpq_train.quantization.forward_pass import begin_forward, end_forward
from cpq_train.quantization.health import Problem, is_weight, refuse
from cpq_train.quantization.layers import quantize_layer, unquantize_layer
from cpq_train.quantization.layers.activation import make_coding, make_plain
from cpq_train.quantization.layers.kinds import kind_of, why_refused
from cpq_train.quantization.prepared import ATTRIBUTE, Prepared, is_prepared, prepared_of
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme
from cpq_train.quantization.switches import quantized_layers, quantizers
from cpq_train.quantization.trace import trace
from cpq_train.quantization.wiring import NEVER_CALLED, RESIDUAL, Wiring
from cpq_train.sparse import adopt

OFF = QuantizerScheme(mode="off")


def prepare(network: nn.Module, scheme: Scheme, example_input: Any, fold: bool = True) -> Prepared:
    """Turn a float network into its quantized structure, in place.

    spconv's own layers become this project's, which have the same parameters and compute the same, also
    where an error follows. The network runs once, to find which layers read one tensor, which BatchNorm reads
    which layer, and what is never called (`trace`). Weight ranges are set; activation ranges are NaN until
    they are calibrated or loaded.

    Args:
        network: Any float network; what of it can be quantized, `coverage` says.
        scheme: What to quantize how.
        example_input: Arguments of the network's forward pass: a tuple is several, anything else is one.
        fold: Multiply BatchNorm into its layer first. Kept BatchNorm trains, and is folded by `fold`.

    Raises:
        UserError: The network is prepared already, a rule of the scheme matches no layer, nothing would be
            quantized, a layer that the scheme quantizes cannot be quantized right, or one whose BatchNorm is
            kept could not take it up afterwards; names it and says why.
    """
    check_float(network)
    adopt(network)
    prepared = _prepare(network, scheme, trace(network, example_input), fold)
    prepared.remember_weights(network)
    return prepared


def prepare_as(network: nn.Module, scheme: Scheme, wiring: Wiring, fold: bool = True) -> Prepared:
    """`prepare` of a network whose layers are known to be connected as `wiring` says."""
    check_float(network)
    adopt(network)
    return _prepare(network, scheme, wiring, fold)


def _prepare(network: nn.Module, scheme: Scheme, wiring: Wiring, fold: bool) -> Prepared:
    prepared = unquantized(network)
    prepared.scheme, prepared.wiring = scheme, wiring
    prepared.schemes = _schemes(network, scheme, prepared.layers, wiring)
    if fold:
        fold_batchnorm(network, wiring.folds)
    else:
        _check_foldable(network, prepared)
    for name, layer_scheme in prepared.schemes.items():
        if not layer_scheme.is_float:
            quantize_layer(network.get_submodule(name), layer_scheme)
    _take_slow_path(network)
    for readers in _sharing(prepared):
        _share(network, readers, prepared)
    for quantizer in quantizers(network).values():
        quantizer.scope = prepared.scope
    make_coding(network, prepared.scope)
    begin = network.register_forward_pre_hook(begin_forward)
    prepared.hooks = (begin, network.register_forward_hook(end_forward, always_call=True))
    network.__dict__[ATTRIBUTE] = prepared
    return prepared


def check_float(network: nn.Module) -> None:
    """Refuse a network that was prepared before.

    Raises:
        UserError: It was.
    """
    if is_prepared(network):
        raise UserError(
            f"this {type(network).__name__} is prepared already, {len(quantized_layers(network))} layers are "
            "quantized; accepted: a float network"
        )


def _schemes(
    network: nn.Module, scheme: Scheme, layers: Mapping[str, str], wiring: Wiring
) -> dict[str, LayerScheme]:
    """What becomes of every layer.

    Raises:
        UserError: A layer that would be quantized cannot be, or not right.
    """
    schemes = scheme.resolve(layers)
    for name in set(wiring.never_called) & schemes.keys():
        schemes[name] = LayerScheme(OFF, OFF, why_float=NEVER_CALLED)
    if all(chosen.is_float for chosen in schemes.values()):
        raise UserError(f"scheme {scheme.name!r}: all layers that it quantizes were {NEVER_CALLED}")
    refused = []
    for name, chosen in schemes.items():
        why = why_refused(network.get_submodule(name))
        if why and chosen.is_float:
            schemes[name] = replace(chosen, why_float=f"refused: {why} ({chosen.why_float})")
        elif why := why or _why_reused(name, chosen, scheme, wiring):
            refused.append(f"{name} ({layers[name]}): {why}")
    if refused:
        raise UserError(
            "these layers cannot be quantized right:\n  "
            + "\n  ".join(refused)
            + "\naccepted: a rule that leaves them in float (weight: off, input: off)"
        )
    return schemes


def _check_foldable(network: nn.Module, prepared: Prepared) -> None:
    """See that BatchNorm that is kept can be folded behind training.

    Raises:
        UserError: See `check_fold`.
    """
    for norm, name in prepared.folds.items():
        if not (chosen := prepared.schemes[name]).weight.is_off:
            axis = chosen.weight_axis(prepared.layers[name])
            check_fold(norm, name, network.get_submodule(name), axis)


def _why_reused(name: str, chosen: LayerScheme, scheme: Scheme, wiring: Wiring) -> str:
    """Why one range cannot serve all uses of a layer, unless the scheme says that it shall."""
    seen = wiring.reused.get(name) or wiring.reused.get(name + RESIDUAL)
    if seen is None or len(set(seen)) == 1 or chosen.input.mode != "static" or scheme.on_reuse == "one_range":
        return ""
    ranges = ", ".join(f"{largest:.4g}" for largest in seen)
    return (
        f"it is used {len(seen)} times on tensors of different ranges ({ranges}); the scheme may say "
        "on_reuse: one_range, or input: {mode: dynamic}"
    )


def remove_quantizers(network: nn.Module) -> None:
    """Make what `prepare` made of a network a float one again, in place; BatchNorm stays as it is."""
    for layer in quantized_layers(network).values():
        unquantize_layer(layer)
    make_plain(network)
    for hook in prepared_of(network).hooks:
        hook.remove()
    del network.__dict__[ATTRIBUTE]


def settle_unfit(network: nn.Module, problems: list[Problem]) -> None:
    """What the network's scheme has done about unfit ranges: an error, or their layers left in float.

    Raises:
        UserError: It is an error, or layers cannot be left in float; see `leave_in_float`.
    """
    scheme = prepared_of(network).scheme
    assert scheme is not None
    if scheme.on_unfit_range == "error":
        refuse(problems)
    leave_in_float(network, problems)


def leave_in_float(network: nn.Module, problems: list[Problem]) -> Scheme:
    """Take the quantizers out of the layers that read a tensor of unfit range, in place.

    Args:
        network: What `prepare` made.
        problems: The unfit ranges, of inputs only.

    Returns:
        The scheme that prepares the structure that is left.

    Raises:
        UserError: The range of a weight is unfit, or nothing would be left quantized.
    """
    refuse([problem for problem in problems if is_weight(problem.quantizer)])
    prepared = prepared_of(network)
    assert prepared.scheme is not None
    assert prepared.wiring is not None
    unfit = {network.get_submodule(problem.quantizer) for problem in problems}
    readers = [
        name
        for name, module in network.named_modules()
        if unfit & {getattr(module, "_input_quantizer", None), getattr(module, "_residual_quantizer", None)}
    ]
    scheme = prepared.scheme.with_float(readers)
    prepared.schemes = _schemes(network, scheme, prepared.layers, prepared.wiring)
    prepared.scheme = scheme
    for name in readers:
        unquantize_layer(network.get_submodule(name))
        for member in (name, name + RESIDUAL):
            prepared.shares_input_with.pop(member, None)
    prepared.left_in_float += readers
    prepared.scope.members = None
    return scheme


def unquantized(network: nn.Module) -> Prepared:
    """What `prepare` would say of a float network that it left alone."""
    layers = quantizable_layers(network)
    unknown = {
        name: type(module).__name__
        for name, module in network.named_modules()
        if module._parameters and name not in layers and not isinstance(module, _BatchNorm)
    }
    return Prepared(layers, dict.fromkeys(layers, LayerScheme(OFF, OFF)), unknown)


def quantizable_layers(network: nn.Module) -> dict[str, str]:
    """Name -> kind of every layer that a scheme may speak of, in the order of the network."""
    kinds = {name: kind_of(module) for name, module in network.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _sharing(prepared: Prepared) -> list[list[str]]:
    """Readers of one tensor with equal input settings, in the order of the network.

    A layer that is used on several tensors has one range for all of them, and so have those that it shares
    each of them with.
    """
    assert prepared.scheme is not None
    assert prepared.wiring is not None
    class_of: dict[str, list[str]] = {}
    for group in prepared.wiring.one_tensor:
        first: dict[QuantizerScheme, str] = {}
        for member in group:
            chosen = prepared.schemes[member.removesuffix(RESIDUAL)].input
            is_out = member.endswith(RESIDUAL) and not prepared.scheme.share_residual
            if chosen.is_off or is_out:
                continue
            ours = class_of.setdefault(member, [member])
            theirs = class_of[first.setdefault(chosen, member)]
            if ours is not theirs:
                theirs += ours
                class_of.update(dict.fromkeys(ours, theirs))
    order = {member: i for i, n in enumerate(prepared.layers) for member in (n, n + RESIDUAL)}
    classes = {id(members): members for members in class_of.values() if len(members) > 1}
    return [sorted(members, key=lambda m: (order[m], m)) for members in classes.values()]


def _share(network: nn.Module, readers: list[str], prepared: Prepared) -> None:
    """Give readers of one tensor one quantizer: that of the first of them that is a layer's only input."""
    assert prepared.wiring is not None
    owner = next((m for m in readers if not m.endswith(RESIDUAL)), readers[0])
    if owner.endswith(RESIDUAL):  # adds alone: the quantizer of an add is that of its branch
        shared = Quantizer(prepared.schemes[owner.removesuffix(RESIDUAL)].input).train(network.training)
    else:
        shared = cast(Quantizer, network.get_submodule(owner)._input_quantizer)
    # Where a member reads several tensors, "the one that it read last" is not known to be this one.
    shared.num_readers = 1 if set(readers) & prepared.wiring.reused.keys() else len(readers)
    for member in readers:
        attribute = "_residual_quantizer" if member.endswith(RESIDUAL) else "_input_quantizer"
        setattr(network.get_submodule(member.removesuffix(RESIDUAL)), attribute, shared)
        if member != owner:
            prepared.shares_input_with[member] = owner


def _take_slow_path(network: nn.Module) -> None:
    """In evaluation PyTorch's transformer layers read the weights of their Linear layers past these."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
