"""A layer on maps as one Conv, for every target: a transposed one is 1x1, and DepthToSpace follows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.plan import Convolution
from cpq_train.quantization.reference.rulebook import Kernel


def as_convolution(layer: Convolution) -> tuple[NDArray[Any], dict[str, Any], int]:
    """A layer as one Conv, which DepthToSpace (CRD) follows where the layer is transposed.

    Returns:
        Weight; attributes; how many channels of the Conv stand side by side for one of the layer.
    """
    kernel = layer.kernel
    if layer.kind == "ConvTranspose2d":
        weight = layer.weight.transpose(1, 2, 3, 0).reshape(-1, len(layer.weight), 1, 1)
        return weight, {}, kernel.size[0] * kernel.size[1]
    pads = [*kernel.padding, *kernel.padding]
    attributes = {"kernel_shape": kernel.size, "strides": kernel.stride, "pads": pads}
    return layer.weight, {**attributes, "dilations": kernel.dilation}, 1


def as_transposed(weight: NDArray[Any], upsampling: int) -> tuple[NDArray[Any], Kernel]:
    """Weight and geometry of the transposed layer that a 1x1 Conv and a DepthToSpace make.

    Args:
        weight: Of the Conv.
        upsampling: Rows and columns that it makes of one.
    """
    size = (upsampling, upsampling)
    found = weight.reshape(-1, *size, weight.shape[1]).transpose(3, 0, 1, 2)
    return np.ascontiguousarray(found), Kernel(size, size, (0, 0), (1, 1))
