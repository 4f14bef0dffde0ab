"""Rulebooks: which input voxel meets which output voxel under which kernel offset.

Letters: V active voxels. A rulebook is spconv's own `IndiceData` (Native, on the CPU) or
`ImplicitGemmIndiceData` (MaskImplicitGemm, on CUDA), kept in the sparse tensor's `indice_dict` under the
layer's `indice_key`, as spconv does it. An inverse convolution reads the one of the layer that it undoes from
its outputs to its inputs.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConvTensor, functional, ops
from spconv.pytorch.core import ImplicitGemmIndiceData, IndiceData
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import MOST_CHANNELS, are_on
from cpq_train.sparse.kernels.rulebook import PairRulebook, build, can_build

if TYPE_CHECKING:
    from spconv.pytorch.conv import SparseConvolution

    from cpq_train.sparse.kernels.convolutions import PairLists

Rulebook: TypeAlias = IndiceData | ImplicitGemmIndiceData

MOST_MASKED_CELLS = 128
"""The largest kernel for which spconv 2.3 ever chooses MaskImplicitGemm; Native takes any."""


def output_shape(layer: SparseConvolution, spatial_shape: list[int]) -> list[int]:
    """Grid size (z, y, x) behind a layer."""
    if layer.subm:
        return spatial_shape
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return list(ops.get_conv_output_size(spatial_shape, *geometry))


def find_or_build(layer: SparseConvolution, x: SparseConvTensor) -> Rulebook:
    """The layer's rulebook for the voxels of `x`; built once per indice key and kept with the tensor.

    A strided layer reuses its own rulebook too: its output rows come in no guaranteed order on CUDA, so that
    two convolutions of one tensor (a sum split over channels) have to share one. An inverse convolution takes
    the one that it finds.

    Raises:
        UserError: What lies under the indice key belongs to other voxels or another kernel, or an inverse
            convolution finds nothing there.
    """
    found = x.find_indice_pair(layer.indice_key)
    if found is not None:
        _check_fits(layer, x, found)
        return found
    if layer.inverse:
        _refuse(
            layer, f"there is no rulebook; keys that have one: {', '.join(map(str, x.indice_dict)) or 'none'}"
        )
    rulebook = _build(layer, x)
    if layer.indice_key is not None:
        x.indice_dict[layer.indice_key] = rulebook
    return rulebook


def _check_fits(layer: SparseConvolution, x: SparseConvTensor, found: Rulebook) -> None:
    if found.is_subm != layer.subm:
        _refuse(layer, f"the rulebook is of a {'submanifold' if found.is_subm else 'strided'} layer")
    for name, value in _shared_settings(layer).items():
        if list(getattr(found, name)) != list(value):
            _refuse(layer, f"the rulebook has {name} {getattr(found, name)}, the layer {value}")
    indices, shape = found.indices, found.spatial_shape
    if layer.inverse:
        indices, shape = found.out_indices, found.out_spatial_shape
    if list(shape) != list(x.spatial_shape) or not _are_same(indices, x.indices):
        _refuse(layer, "the rulebook belongs to other voxels")


def _refuse(layer: SparseConvolution, reason: str) -> NoReturn:
    said = f"{type(layer).__name__}({layer.extra_repr()})"
    raise UserError(f"{said} cannot use its indice key {layer.indice_key!r}: {reason}")


def _shared_settings(layer: SparseConvolution) -> dict[str, Any]:
    """What layers with one rulebook have in common; a submanifold layer's stride and padding mean nothing."""
    kernel = _kernel(layer)
    if layer.inverse:
        return {"ksize": kernel["ksize"]}
    return {name: kernel[name] for name in ("ksize", "dilation")} if layer.subm else kernel


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and torch.equal(a, b))


def _kernel(layer: SparseConvolution) -> dict[str, Any]:
    return {
        "ksize": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
    }


def _record(layer: SparseConvolution, x: SparseConvTensor, algo: ConvAlgo) -> dict[str, Any]:
    return {
        **_kernel(layer),
        "is_subm": layer.subm,
        "spatial_shape": x.spatial_shape,
        "out_spatial_shape": output_shape(layer, x.spatial_shape),
        "algo": algo,
    }


def _build(layer: SparseConvolution, x: SparseConvTensor) -> Rulebook:
    if not len(x.indices):
        return _build_empty(layer, x)
    if x.features.is_cuda:
        is_small = prod(layer.kernel_size) <= MOST_MASKED_CELLS
        return _build_implicit_gemm(layer, x) if is_small else _build_native(layer, x)
    kernel, record = _kernel(layer), _record(layer, x, ConvAlgo.Native)
    if are_on() and can_build(x, layer.subm, kernel, record["out_spatial_shape"]):
        return build(x, layer.subm, kernel, record)
    return _build_native(layer, x)


def _build_empty(layer: SparseConvolution, x: SparseConvTensor) -> IndiceData:
    """No voxel in, none out; spconv's kernels do not take that case."""
    num_cells = prod(layer.kernel_size)
    pairs, num_pairs = x.indices.new_empty((2, num_cells, 0)), x.indices.new_zeros(num_cells)
    return IndiceData(x.indices, x.indices, pairs, num_pairs, **_record(layer, x, ConvAlgo.Native))


def _build_native(layer: SparseConvolution, x: SparseConvTensor) -> IndiceData:
    out_indices, pairs, num_pairs = ops.get_indice_pairs(
        x.indices.contiguous(),  # spconv reads the memory, whatever the strides
        x.batch_size,
        x.spatial_shape,
        ConvAlgo.Native,
        out_padding=layer.output_padding,
        subm=layer.subm,
        **_kernel(layer),
    )
    return IndiceData(out_indices, x.indices, pairs, num_pairs, **_record(layer, x, ConvAlgo.Native))


def _build_implicit_gemm(layer: SparseConvolution, x: SparseConvTensor) -> ImplicitGemmIndiceData:
    (out_indices, _, pair_fwd, pair_bwd, mask_fwd, mask_bwd, argsort_fwd, argsort_bwd, masks) = (
        ops.get_indice_pairs_implicit_gemm(
            x.indices.contiguous(),  # spconv reads the memory, whatever the strides
            x.batch_size,
            x.spatial_shape,
            ConvAlgo.MaskImplicitGemm,
            out_padding=layer.output_padding,
            # One rulebook serves every use of its key, so it always has what a backward pass needs.
            is_train=True,
            alloc=x.thrust_allocator,
            subm=layer.subm,
            **_kernel(layer),
        )
    )
    return ImplicitGemmIndiceData(
        out_indices,
        x.indices,
        pair_fwd,
        pair_bwd,
        pair_mask_fwd_splits=mask_fwd,
        pair_mask_bwd_splits=mask_bwd,
        mask_argsort_fwd_splits=argsort_fwd,
        mask_argsort_bwd_splits=argsort_bwd,
        masks=masks,
        **_record(layer, x, ConvAlgo.MaskImplicitGemm),
    )


def count_pairs(layer: SparseConvolution, x: SparseConvTensor) -> int:
    """How often an input voxel meets an output voxel: a convolution costs C_in * C_out products for each."""
    return len(x.indices) if layer.conv1x1 else num_pairs(find_or_build(layer, x))


def num_pairs(rulebook: Rulebook) -> int:
    """The pairs that a rulebook lists."""
    if isinstance(rulebook, ImplicitGemmIndiceData):
        return int((rulebook.pair_fwd >= 0).sum())
    listed = int(rulebook.indice_pair_num.sum())
    # Of a submanifold kernel Native lists one half; the other mirrors it, and every voxel meets itself.
    return 2 * listed + len(rulebook.indices) if rulebook.is_subm else listed


def lists_of(rulebook: Rulebook | None, inverse: bool) -> PairLists | None:
    """The pairs of a rulebook for our kernels, from its outputs to its inputs if `inverse`.

    Returns:
        None where spconv's kernels compute.
    """
    if not isinstance(rulebook, PairRulebook) or not are_on():
        return None
    return rulebook.lists.turned() if inverse else rulebook.lists


def gather_multiply_scatter(
    features: Tensor, weight: Tensor, rulebook: Rulebook, inverse: bool = False
) -> Tensor:
    """The convolution proper, differentiable in features and weight.

    Args:
        features: input features, shape (V_in, C_in).
        weight: KRSC weight, shape (C_out, kz, ky, kx, C_in).
        rulebook: what `find_or_build` returned for these voxels.
        inverse: read it from its outputs to its inputs.

    Returns:
        Output features without a bias, shape (V_out, C_out).
    """
    num_out = num_outputs(rulebook, inverse)
    if not len(features):
        # The product keeps the weight in the graph, so that its gradient is zero and not missing.
        return features.new_zeros((num_out, weight.shape[0])) * weight.sum()
    if isinstance(rulebook, IndiceData):
        return _native(features, weight, rulebook, num_out, inverse)
    return _implicit_gemm(features, weight, rulebook, num_out, inverse)


def num_outputs(rulebook: Rulebook, inverse: bool) -> int:
    """Rows of a convolution's output, which reads a rulebook from its outputs to its inputs if `inverse`."""
    return len(rulebook.indices if inverse else rulebook.out_indices)


def sides(rulebook: ImplicitGemmIndiceData, inverse: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Pairs, masks and orders of rows, of a forward pass and of the way back."""
    forth = (rulebook.pair_fwd, rulebook.pair_mask_fwd_splits, rulebook.mask_argsort_fwd_splits)
    back = (rulebook.pair_bwd, rulebook.pair_mask_bwd_splits, rulebook.mask_argsort_bwd_splits)
    return (back, forth) if inverse else (forth, back)


def _native(features: Tensor, weight: Tensor, rulebook: IndiceData, num_out: int, inverse: bool) -> Tensor:
    lists = lists_of(rulebook, inverse)
    if lists is not None and features.dtype == torch.float32 and features.shape[1] <= MOST_CHANNELS:
        from cpq_train.sparse.kernels import node  # Numba, which takes a second

        return node.convolve(features, weight, lists)
    plain = functional.indice_inverse_conv if inverse else functional.indice_conv
    convolve = functional.indice_subm_conv if rulebook.is_subm else plain
    out: Tensor = convolve(
        features, weight, rulebook.indice_pairs, rulebook.indice_pair_num, num_out, ConvAlgo.Native
    )
    return out


def _implicit_gemm(
    features: Tensor, weight: Tensor, rulebook: ImplicitGemmIndiceData, num_out: int, inverse: bool
) -> Tensor:
    out: Tensor = functional.implicit_gemm(
        features,
        weight,
        *(tensor for both in zip(*sides(rulebook, inverse), strict=True) for tensor in both),
        num_out,
        rulebook.masks,
        True,  # is_train: keeps what backward needs, and the same kernel in train and eval
        rulebook.is_subm,
    )
    return out
