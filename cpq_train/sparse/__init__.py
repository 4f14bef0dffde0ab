"""The one seam to spconv: sparse convolutions, one algorithm per device, alike in train and eval."""

import logging

from cpq_train.sparse.importing import importing_spconv

with importing_spconv():
    from spconv.pytorch import SparseConvTensor, SparseModule, SparseSequential

from cpq_train.common.kernels import reference_kernels
from cpq_train.sparse.adoption import adopt, why_not_adopted
from cpq_train.sparse.convolution import SparseConv3d, SparseInverseConv3d, SubMConv3d
from cpq_train.sparse.products import use_regular_products
from cpq_train.sparse.residual import ResidualAdd

use_regular_products()
# spconv asks torch.fx whether it is tracing, and torch answers with advice to spconv's authors.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

__all__ = [
    "ResidualAdd",
    "SparseConv3d",
    "SparseConvTensor",
    "SparseInverseConv3d",
    "SparseModule",
    "SparseSequential",
    "SubMConv3d",
    "adopt",
    "reference_kernels",
    "why_not_adopted",
]
