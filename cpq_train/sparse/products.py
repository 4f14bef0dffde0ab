"""The matrix products of spconv's kernels on the CPU, so that a voxel's sum depends on that voxel alone.

A BLAS multiplies few rows, or into few columns, by other kernels than many: last bits of a voxel's output
would depend on how many voxels there are. MKL's kernels for matrices of regular size add the products of a
number one after the other, each with one rounding, as those of onnxruntime do, which lets a deployment file
compute the same bits. So small matrices are padded with zeros to that size.

Letters: V voxels, C C' input and output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from spconv.constants import AllocKeys
from spconv.pytorch import ops
from spconv.pytorch.cppcore import TorchSpconvMatmul, torch_tensor_to_tv
from torch import Tensor
from torch.nn import functional

REGULAR = 16
"""Rows and columns from which on products are regular; seen from 4 rows and 11 columns on (MKL, AVX-512)."""


def product(rows_VC: Tensor, weight_OC: Tensor) -> Tensor:
    """`rows_VC @ weight_OC.T`, (V, C'); a row of it depends on that row alone."""
    if _needs_padding(rows_VC, len(rows_VC), len(weight_OC)):
        return padded_product(rows_VC, weight_OC)
    return torch.mm(rows_VC, weight_OC.T)


def padded_product(rows_VC: Tensor, weight_OC: Tensor) -> Tensor:
    """`rows_VC @ weight_OC.T`, (V, C'), computed as of a matrix of regular size."""
    num_rows, num_columns = len(rows_VC), len(weight_OC)
    rows_VC, weight_OC = (
        functional.pad(matrix, (0, 0, 0, max(0, REGULAR - len(matrix)))) for matrix in (rows_VC, weight_OC)
    )
    out = torch.mm(rows_VC, weight_OC.T)[:num_rows, :num_columns]
    return out.clone(memory_format=torch.contiguous_format)  # a view must not leave a node of autograd


class RegularProducts(TorchSpconvMatmul):
    """What spconv's CPU kernels call for each kernel cell; arguments are those of spconv 2.3's class."""

    def indice_conv_init_gemm(
        self, features_n: str, filters_n: str, all_weight_is_krsc: bool, is_kc_not_ck: bool,
        kv_center: int, out_channel: int, stream_int: int = 0,
    ) -> Any:  # fmt: skip
        """The centre cell of a submanifold convolution; its product becomes the output."""
        features, filters = self.alloc.allocated[features_n], self.alloc.allocated[filters_n]
        if not _needs_padding(features, len(features), out_channel):
            return super().indice_conv_init_gemm(
                features_n, filters_n, all_weight_is_krsc, is_kc_not_ck, kv_center, out_channel, stream_int
            )
        out = padded_product(features, _cell(filters, kv_center))
        self.alloc.allocated[AllocKeys.OutFeatures] = out
        return torch_tensor_to_tv(out)

    def indice_conv_cpu_gemm(
        self, inp_buffer_n: str, out_buffer_n: str, filters_n: str, all_weight_is_krsc: bool,
        is_kc_not_ck: bool, nhot: int, index: int,
    ) -> None:  # fmt: skip
        """Another cell: the product of the rows gathered for it, which spconv adds to their places."""
        rows, out = self.alloc.allocated[inp_buffer_n], self.alloc.allocated[out_buffer_n]
        filters = self.alloc.allocated[filters_n]
        if _needs_padding(rows, nhot, len(filters)):
            out[:nhot] = padded_product(rows[:nhot], _cell(filters, index))
        else:
            super().indice_conv_cpu_gemm(
                inp_buffer_n, out_buffer_n, filters_n, all_weight_is_krsc, is_kc_not_ck, nhot, index
            )


def _needs_padding(rows: Tensor, num_rows: int, num_columns: int) -> bool:
    is_small = num_rows < REGULAR or num_columns < REGULAR
    return is_small and rows.device.type == "cpu" and rows.dtype == torch.float32


def _cell(filters: Tensor, index: int) -> Tensor:
    """(C', C) of a kernel cell of KRSC weights."""
    return filters.reshape(len(filters), -1, filters.shape[-1])[:, index]


def use_regular_products() -> None:
    """Have spconv's CPU kernels call them."""
    ops.TorchSpconvMatmul = RegularProducts
