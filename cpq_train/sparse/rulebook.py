"""Rulebooks: which input voxel meets which output voxel under which kernel offset.

Letters: V active voxels. A rulebook is spconv's own `IndiceData` (Native, on the CPU) or
`ImplicitGemmIndiceData` (MaskImplicitGemm, on CUDA), kept in the sparse tensor's `indice_dict` under the
layer's `indice_key`, as spconv does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from spconv.core import ConvAlgo
from spconv.pytorch import SparseConvTensor, functional, ops
from spconv.pytorch.core import ImplicitGemmIndiceData, IndiceData
from torch import Tensor

if TYPE_CHECKING:
    from spconv.pytorch.conv import SparseConvolution

Rulebook: TypeAlias = IndiceData | ImplicitGemmIndiceData


def output_shape(layer: SparseConvolution, spatial_shape: list[int]) -> list[int]:
    """Grid size (z, y, x) behind a layer."""
    if layer.subm:
        return spatial_shape
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return list(ops.get_conv_output_size(spatial_shape, *geometry))


def find_or_build(layer: SparseConvolution, x: SparseConvTensor) -> Rulebook:
    """The layer's rulebook for the voxels of `x`; built once per indice key and kept with the tensor.

    A strided layer reuses its own rulebook too: its output rows come in no guaranteed order on CUDA, so that
    two convolutions of one tensor (a sum split over channels) have to share one.

    Raises:
        AssertionError: the indice key already belongs to other voxels or another kernel.
    """
    found = x.find_indice_pair(layer.indice_key)
    if found is not None:
        same_kernel = all(getattr(found, name) == value for name, value in _kernel(layer).items())
        same_voxels = found.is_subm == layer.subm and found.indices is x.indices
        if not (same_kernel and same_voxels):
            raise AssertionError(f"indice key {layer.indice_key!r} belongs to another kernel or other voxels")
        return found
    build = _build_implicit_gemm if x.features.is_cuda else _build_native
    rulebook = build(layer, x)
    if layer.indice_key is not None:
        x.indice_dict[layer.indice_key] = rulebook
    return rulebook


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


def num_pairs(rulebook: Rulebook) -> int:
    """How often an input voxel meets an output voxel: a convolution costs C_in * C_out products for each."""
    if isinstance(rulebook, ImplicitGemmIndiceData):
        return int((rulebook.pair_fwd >= 0).sum())
    listed = int(rulebook.indice_pair_num.sum())
    # Of a submanifold kernel Native lists one half; the other mirrors it, and every voxel meets itself.
    return 2 * listed + len(rulebook.indices) if rulebook.is_subm else listed


def gather_multiply_scatter(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """The convolution proper, differentiable in features and weight.

    Args:
        features: input features, shape (V_in, C_in).
        weight: KRSC weight, shape (C_out, kz, ky, kx, C_in).
        rulebook: what `find_or_build` returned for these voxels.

    Returns:
        Output features without a bias, shape (V_out, C_out).
    """
    num_out = rulebook.out_indices.shape[0]
    if isinstance(rulebook, IndiceData):
        convolve = functional.indice_subm_conv if rulebook.is_subm else functional.indice_conv
        out: Tensor = convolve(
            features, weight, rulebook.indice_pairs, rulebook.indice_pair_num, num_out, ConvAlgo.Native
        )
        return out
    out = functional.implicit_gemm(
        features,
        weight,
        rulebook.pair_fwd,
        rulebook.pair_bwd,
        rulebook.pair_mask_fwd_splits,
        rulebook.pair_mask_bwd_splits,
        rulebook.mask_argsort_fwd_splits,
        rulebook.mask_argsort_bwd_splits,
        num_out,
        rulebook.masks,
        True,  # is_train: keeps what backward needs, and the same kernel in train and eval
        rulebook.is_subm,
    )
    return out
