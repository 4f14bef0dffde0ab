"""What a quantized layer did in a forward pass, and what the integer reference makes of the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization import reference
from cpq_train.quantization.layers import QuantAdd, QuantLinear
from cpq_train.quantization.layers.convolution import RoundedWeight
from cpq_train.quantization.layers.integer_convolution import Convolution
from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.exact_sum import Sums
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.switches import QuantizedLayer, evaluating
from cpq_train.sparse import SparseConvTensor

Array: TypeAlias = NDArray[Any]


class Observed(NamedTuple):
    """One call of a layer.

    Attributes:
        codes: Of the input; of both inputs of an add, broadcast, one behind the other.
        weight_codes: Empty for an add.
        sums: Before they were scaled, with the bias where it is a whole number; None for an add, whose sum is
            never one.
        output: Features or map.
        positions: Of the output rows of a sparse layer, (V, 4) batch, z, y, x.
        shape: Grid of these positions.
        indice_dict: The rulebooks that its output brings along.
    """

    codes: Array
    weight_codes: Array
    sums: Array | None
    output: Array
    positions: Array | None = None
    shape: tuple[int, ...] = ()
    indice_dict: Mapping[str, Any] | None = None


Take: TypeAlias = Callable[[str, nn.Module, tuple[Any, ...], Observed], None]


def why_not_covered(layer: QuantizedLayer) -> str:
    """Why the integer reference says nothing of a quantized layer; empty where it does."""
    if layer.why_simulated:
        return f"simulated: {layer.why_simulated}"
    is_on = layer._input_quantizer.is_active if isinstance(layer, QuantAdd) else len(layer._active()) == 2
    return "its quantizers are switched off" if layer.is_bypassed or not is_on else ""


@contextmanager
def observing(layers: Mapping[str, Any], take: Take) -> Iterator[None]:
    """While open, hand every call of the layers to `take(name, layer, arguments, observed)`."""
    handles, tapped = [], []
    for name, layer in layers.items():
        tap: list[Tensor] = []
        if not isinstance(layer, QuantAdd):
            _tap_sums(layer, tap)
            tapped.append(layer)
        handles.append(layer.register_forward_hook(_hook(name, tap, take), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in tapped:
            del layer._sums


def _tap_sums(layer: Any, tap: list[Tensor]) -> None:
    """Keep what enters and leaves the layer's sum, which is the last point where both are whole numbers."""
    exact_sums = layer._sums

    def tapped(x: Coded, x_codes: Tensor, weight: RoundedWeight, convolution: Convolution) -> Sums:
        sums: Sums = exact_sums(x, x_codes, weight, convolution)
        # Bytes would wrap around where codes are subtracted; the others are scaled in place afterwards.
        tap[:] = [x_codes.float(), weight.codes.clone(), sums.total(layer.axes)]
        return sums

    layer._sums = tapped


def _hook(name: str, tap: list[Tensor], take: Take) -> Callable[..., None]:
    def hook(layer: nn.Module, given: tuple[Any, ...], by_name: dict[str, Any], output: Any) -> None:
        arguments = arguments_in_order(layer, given, by_name)
        if isinstance(layer, QuantAdd):
            pairs = zip(_add_quantizers(layer), arguments, strict=True)
            codes = np.stack(np.broadcast_arrays(*(_array(q.codes(tensor)[0]) for q, tensor in pairs)))
            take(name, layer, arguments, Observed(codes, codes[:0], None, _array(output)))
            return
        codes, weight_codes, sums = map(_array, tap)
        if isinstance(output, SparseConvTensor):
            positions = _array(output.indices).astype(np.int64)
            place = positions, tuple(output.spatial_shape), output.indice_dict
            take(name, layer, arguments, Observed(codes, weight_codes, sums, _array(output.features), *place))
        else:
            # A single sample meets the sum as a batch of one.
            codes, sums = codes.reshape(arguments[0].shape), sums.reshape(output.shape)
            take(name, layer, arguments, Observed(codes, weight_codes, sums, _array(output)))

    return hook


def arguments_in_order(
    layer: nn.Module, given: tuple[Any, ...], by_name: Mapping[str, Any]
) -> tuple[Any, ...]:
    """All arguments of a call in the order that the layer's forward pass has them."""
    return signature(type(layer).forward).bind(layer, *given, **by_name).args[1:]


def evaluate(name: str, layer: Any, arguments: tuple[Any, ...]) -> reference.LayerResult:
    """What the integer reference computes from the arguments of a layer's forward pass.

    Raises:
        UserError: An input has values without integer codes.
    """
    try:
        return _evaluate(layer, arguments)
    except UserError as error:
        raise UserError(f"layer {name!r}: {error}") from error


def _evaluate(layer: Any, arguments: tuple[Any, ...]) -> reference.LayerResult:
    if isinstance(layer, QuantAdd):
        branch, identity = (_range(q) for q in _add_quantizers(layer))
        return reference.add(_array(arguments[0]), branch, _array(arguments[1]), identity)
    x, *output_size = arguments
    convolution = _convolution(layer)
    if isinstance(layer, QuantLinear):
        return reference.linear(convolution, _array(x.float()))
    if not isinstance(x, SparseConvTensor):
        return reference.dense_convolution(_sized(convolution, x, *output_size), _array(x.float()))
    positions = _array(x.indices).astype(np.int64)
    grid = tuple(x.spatial_shape)
    if layer.inverse and not layer.conv1x1:
        return _evaluate_inverse(layer, x, positions)
    return reference.sparse_convolution(convolution, _array(x.features.float()), positions, grid)


def _evaluate_inverse(layer: Any, x: SparseConvTensor, positions: Array) -> reference.LayerResult:
    """Geometry and targets are those of the layer that it undoes."""
    undone = x.find_indice_pair(layer.indice_key)
    geometry = (undone.ksize, undone.stride, undone.padding, undone.dilation)
    convolution = replace(_convolution(layer), kernel=reference.Kernel(*map(tuple, geometry)))
    targets = _array(undone.indices).astype(np.int64)
    features, shape = _array(x.features.float()), tuple(x.spatial_shape)
    return reference.inverse_sparse_convolution(convolution, features, positions, shape, targets)


def in_the_order_of(seen: Observed, expected: reference.LayerResult) -> tuple[reference.LayerResult, int]:
    """The reference's rows in the order of a sparse layer's.

    Returns:
        The rows, NaN where the reference has no such voxel; how many voxels only the reference has.
    """
    assert expected.positions is not None
    assert seen.positions is not None
    rows = reference.RowOf(expected.positions, seen.shape)(seen.positions)
    is_known = (rows >= 0)[:, None]
    output = np.where(is_known, expected.output[rows], np.float32(np.nan))
    sums = np.where(is_known, expected.sums[rows], np.iinfo(np.int64).min)
    num_lost = len(expected.positions) - int(is_known.sum())
    return expected._replace(output=output, sums=sums, positions=seen.positions), num_lost


def run(network: nn.Module, inputs: Sequence[Any]) -> Any:
    """The network's output in evaluation mode."""
    with torch.no_grad(), evaluating(network):
        return network(*inputs)


def _convolution(layer: Any) -> reference.Convolution:
    convolution = reference.Convolution(
        kind=layer.kind,
        weight=_array(layer.weight),
        bias=None if layer.bias is None else _array(layer.bias),
        weight_range=_range(layer._weight_quantizer),
        input_range=_range(layer._input_quantizer),
        bias_kind=layer.bias_kind,
    )
    if isinstance(layer, QuantLinear):
        return convolution
    size, stride, dilation = (tuple(g) for g in (layer.kernel_size, layer.stride, layer.dilation))
    before, behind = _padding(layer)
    return replace(
        convolution,
        kernel=reference.Kernel(size, stride, before, dilation),
        output_padding=tuple(layer.output_padding),
        groups=layer.groups,
        more_behind=tuple(b - a for a, b in zip(before, behind, strict=True)),
    )


def _padding(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and behind each axis."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding), tuple(layer.padding)
    # "same" makes up for what a kernel takes away, at the end if one is left over; "valid" does not.
    taken = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    taken = taken if layer.padding == "same" else [0] * len(taken)
    before = tuple(t // 2 for t in taken)
    return before, tuple(t - b for t, b in zip(taken, before, strict=True))


def _sized(
    convolution: reference.Convolution, x: Tensor, output_size: Sequence[int] | None = None
) -> reference.Convolution:
    """With the output padding that gives the size which a call asked for."""
    if output_size is None:
        return convolution
    num_dims = len(convolution.kernel.size)
    least = convolution.kernel.transposed_shape(x.shape[-num_dims:], [0] * num_dims)
    extra = tuple(size - n for size, n in zip(output_size[-num_dims:], least, strict=True))
    return replace(convolution, output_padding=extra)


def _range(quantizer: Quantizer) -> reference.Range:
    scheme = quantizer.scheme
    return reference.Range(
        scheme.bits,
        scheme.signed,
        scheme.narrow_range,
        amax=None if scheme.mode == "dynamic" else _array(cast(Tensor, quantizer.amax)),
        axis=None if quantizer.is_per_tensor else quantizer._axis[0],
        step_of_zero=quantizer.step_of_zero,
    )


def _add_quantizers(layer: QuantAdd) -> tuple[Quantizer, Quantizer]:
    return layer._input_quantizer, layer._residual_quantizer or layer._input_quantizer


def _array(tensor: Tensor) -> Array:
    return cast(Array, tensor.detach().cpu().numpy())
