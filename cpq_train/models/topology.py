"""How a CenterPoint network is built: its blocks, by the names of their layers.

Everything is found through the network's own attributes, so that a network whose layers were replaced in
place, such as a quantized one, gives the same answers.
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from cpq_train.models.centerpoint import CenterPoint
from cpq_train.sparse import ResidualAdd, SparseConv3d, SubMConv3d

LAYERS = (SubMConv3d, SparseConv3d, nn.Conv2d, nn.ConvTranspose2d, ResidualAdd)
"""The types of a network's layers; BatchNorm, activations and padding are no layers of their own."""


def names_of(network: nn.Module) -> dict[nn.Module, str]:
    """Module -> its name in the network."""
    return {module: name for name, module in network.named_modules()}


def blocks_of(network: CenterPoint) -> dict[str, list[str]]:
    """Name of each block -> the names of its layers, both in the order of the network.

    A block is a residual block, a strided convolution, a level of the BEV backbone, its upsampling, or the
    branches of one class group; it is named as the module that holds its layers.
    """
    names = names_of(network)
    return {
        names[block]: [names[layer] for layer in block.modules() if isinstance(layer, LAYERS)]
        for block in _blocks(network)
    }


def _blocks(network: CenterPoint) -> list[nn.Module]:
    sparse, bev, head = network.backbone_3d, network.backbone_2d, network.dense_head
    stages = (sparse.conv1, sparse.conv2, sparse.conv3, sparse.conv4)
    return [
        sparse.conv_input,
        *chain.from_iterable(stage.children() for stage in stages),
        sparse.conv_out,
        *bev.blocks,
        *bev.deblocks,
        head.shared_conv,
        *head.heads_list,
    ]
