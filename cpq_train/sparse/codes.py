"""Sparse convolutions of integer codes by spconv's kernels, and the gradients of the values they stand for.

A convolution of codes is made with one weight, its codes, and differentiated with another, their values: so
these are spconv's functions without its autograd nodes.

TF32, in which tensor cores multiply fp32 numbers, has 11 significant bits: it holds codes of 8 bits, and adds
in fp32. spconv leaves it off, because numbers lose half of theirs; here it is on, in a table of tuned kernels
of its own, so that what it has found for codes is never taken for numbers. The first sums of every size are
compared with those without it. Gradients are computed as spconv computes all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from spconv import constants
from spconv.pytorch import ops
from spconv.pytorch.core import IndiceData
from torch import Tensor

from cpq_train.common.proofs import Proofs
from cpq_train.sparse.rulebook import Rulebook, num_outputs, sides

_proofs = Proofs("spconv's sums of codes in TF32")

Gradients: TypeAlias = tuple[Tensor, Tensor]


class Products(NamedTuple):
    """Of codes.

    Attributes:
        sums: (V', C'), fp32.
        state: What `gradients` needs of the pass: (mask of each output row, its width), or None.
    """

    sums: Tensor
    state: Any


def convolve(features: Tensor, weight: Tensor, rulebook: Rulebook, inverse: bool) -> Products:
    """The convolution of codes, without a gradient.

    Args:
        features: Codes (V, C), fp32, contiguous.
        weight: Codes, KRSC.
        rulebook: Of the voxels.
        inverse: Read it from its outputs to its inputs.
    """
    num_out = num_outputs(rulebook, inverse)
    if not len(features):
        return Products(features.new_zeros((num_out, weight.shape[0])), None)
    if isinstance(rulebook, IndiceData):
        pairs = rulebook.indice_pairs, rulebook.indice_pair_num
        how = inverse, rulebook.is_subm, rulebook.algo
        return Products(ops.indice_conv(features, weight, *pairs, num_out, *how), None)
    forth, _ = sides(rulebook, inverse)

    def products() -> Products:
        sums, *state = ops.implicit_gemm(
            features, weight, *forth, num_out, rulebook.masks, True, rulebook.is_subm
        )
        return Products(sums, state)

    way = weight.shape, features.device  # what spconv chooses a kernel by
    if not _proofs.trusts(way):
        return products()
    with _tensor_cores():
        found = products()
    _proofs.look(way, found.sums, lambda: products().sums)
    return found


def gradients(
    grad: Tensor, features: Tensor, weight: Tensor, rulebook: Rulebook, inverse: bool, state: Any
) -> Gradients:
    """Gradients of input and weight.

    Args:
        grad: Of the sums, (V', C').
        features: (V, C), fp32.
        weight: KRSC.
        rulebook: Of the voxels.
        inverse: See `convolve`.
        state: What `convolve` said.
    """
    grad, features, weight = grad.contiguous(), features.contiguous(), weight.contiguous()
    if not len(features):
        return torch.zeros_like(features), torch.zeros_like(weight)
    if isinstance(rulebook, IndiceData):
        pairs = rulebook.indice_pairs, rulebook.indice_pair_num
        how = inverse, rulebook.is_subm, rulebook.algo
        return cast(Gradients, ops.indice_conv_backward(features, weight, grad, *pairs, *how))
    (pair_forth, mask_forth, order_forth), (pair_back, mask_back, order_back) = sides(rulebook, inverse)
    mask_out, mask_width = state
    found = ops.implicit_gemm_backward(
        *(features, weight, grad, pair_forth, pair_back, mask_forth, mask_back, order_forth, order_back),
        mask_output_fwd=mask_out,
        masks=rulebook.masks,
        mask_width=mask_width,
        is_subm=rulebook.is_subm,
    )
    return cast(Gradients, found)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """While open, spconv may multiply in TF32, and keeps what it finds of kernels apart."""
    before = constants.SPCONV_ALLOW_TF32, ops.CONV_CPP
    constants.SPCONV_ALLOW_TF32, ops.CONV_CPP = True, _kernels_for_codes()
    try:
        yield
    finally:
        constants.SPCONV_ALLOW_TF32, ops.CONV_CPP = before


@cache
def _kernels_for_codes() -> Any:
    """A table of tuned kernels as spconv's own; None where spconv was built without one."""
    if ops.CONV_CPP is None:
        return None
    from spconv import algo

    described = map(algo.algocore.get_conv_algo_desp_from_param, algo.ALL_IMPGEMM_PARAMS)
    return algo.ConvTunerSimple(list(described))
