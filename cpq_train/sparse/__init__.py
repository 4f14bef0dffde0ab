"""The one seam to spconv: sparse convolutions, one algorithm per device, alike in train and eval."""

from spconv.pytorch import SparseConvTensor, SparseModule, SparseSequential

from cpq_train.sparse.convolution import SparseConv3d, SubMConv3d
from cpq_train.sparse.residual import ResidualAdd

__all__ = [
    "ResidualAdd",
    "SparseConv3d",
    "SparseConvTensor",
    "SparseModule",
    "SparseSequential",
    "SubMConv3d",
]
