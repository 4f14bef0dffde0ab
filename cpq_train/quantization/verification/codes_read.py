"""The codes that every layer of a network read, and how far they are from those of another run of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cpq_train.quantization.reference.rulebook import RowOf
from cpq_train.quantization.switches import quantized_layers
from cpq_train.quantization.verification.observation import Array, Observed, observing, run
from cpq_train.sparse import SparseConvTensor

LOST = 2**15
"""Distance of a code to that of a voxel which only one of the two has."""


class Read(NamedTuple):
    """Codes that a layer read.

    Attributes:
        codes: One array for each tensor that it reads.
        positions: (V, 4) batch, z, y, x of their rows; None where they are maps.
        grid: Of these positions.
    """

    codes: tuple[Array, ...]
    positions: Array | None = None
    grid: tuple[int, ...] = ()


def codes_read(network: nn.Module, inputs: Sequence[Any]) -> tuple[Any, dict[str, Read]]:
    """The outputs of a network, and what its quantized layers read.

    Args:
        network: Calibrated; it runs in evaluation mode, wherever it is.
        inputs: Arguments of its forward pass.
    """
    found: dict[str, Read] = {}
    place: list[Observed] = []

    def take(name: str, layer: nn.Module, arguments: tuple[Any, ...], observed: Observed) -> None:
        x = arguments[0]
        if isinstance(x, SparseConvTensor):
            place[:] = [observed]
            positions = x.indices.cpu().numpy().astype(np.int64)
            found[name] = Read((observed.codes,), positions, tuple(x.spatial_shape))
        elif x.dim() == 2:  # an add reads what the convolution before it made, on the same voxels
            found[name] = Read(tuple(observed.codes), place[0].positions, place[0].shape)
        else:
            found[name] = Read((observed.codes,))

    with observing(quantized_layers(network), take):
        outputs = run(network, inputs)
    return outputs, found


def steps_apart(codes: Array, read: Read, others: Array, positions: Array | None) -> Array:
    """Distances of codes to those of another run, whose voxels may come in another order.

    Args:
        codes: One of the arrays of `read`.
        read: Where they are.
        others: Those of the other run.
        positions: Of the rows of `others`, as `read` has them; None for maps.
    """
    if read.positions is None or positions is None:
        return np.asarray(np.abs(codes - others))
    rows = RowOf(positions, read.grid)(read.positions)
    steps = np.abs(codes - others[rows]) if len(positions) else np.zeros_like(codes)
    steps[rows < 0] = LOST
    num_more = len(positions) - int((rows >= 0).sum())
    return np.concatenate([steps, np.full((num_more, codes.shape[1]), LOST)])
