"""Blocks and layers of the network, by their names in published checkpoints."""

import pytest

from cpq_train.arms.structure import build
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.topology import LAYERS, blocks_of
from cpq_train.quantization.layers import QUANTIZED
from cpq_train.quantization.scheme import Scheme

BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")
RESIDUAL = "conv1 conv2 quant_add"
LEVEL = "1 4 7 10 13 16"
EXPECTED = {
    "backbone_3d.conv_input": "0",
    "backbone_3d.conv1.0": RESIDUAL,
    "backbone_3d.conv1.1": RESIDUAL,
    "backbone_3d.conv2.0": "0",
    "backbone_3d.conv2.1": RESIDUAL,
    "backbone_3d.conv2.2": RESIDUAL,
    "backbone_3d.conv3.0": "0",
    "backbone_3d.conv3.1": RESIDUAL,
    "backbone_3d.conv3.2": RESIDUAL,
    "backbone_3d.conv4.0": "0",
    "backbone_3d.conv4.1": RESIDUAL,
    "backbone_3d.conv4.2": RESIDUAL,
    "backbone_3d.conv_out": "0",
    "backbone_2d.blocks.0": LEVEL,
    "backbone_2d.blocks.1": LEVEL,
    "backbone_2d.deblocks.0": "0",
    "backbone_2d.deblocks.1": "0",
    "dense_head.shared_conv": "0",
    **{f"dense_head.heads_list.{i}": " ".join(f"{b}.0.0 {b}.1" for b in BRANCHES) for i in range(6)},
}
"""Block -> its layers, by their names in it; of the default network."""


@pytest.mark.parametrize("arm", ["float", "ptq"])
def test_blocks_of_the_default_network(arm: str) -> None:
    scheme = None if arm == "float" else Scheme.from_file("configs/schemes/int8.yaml")
    blocks = blocks_of(build(NetworkConfig(), arm, scheme).network)
    assert list(blocks) == list(EXPECTED)
    for block, layers in EXPECTED.items():
        assert blocks[block] == [f"{block}.{layer}" for layer in layers.split()]


def test_blocks_of_a_network_of_other_depth() -> None:
    network = CenterPoint(
        backbone_3d_num_blocks=(1, 0, 0, 1),
        backbone_2d_num_layers=(0,),
        backbone_2d_channels=(16,),
        backbone_2d_strides=(2,),
        upsample_strides=(2,),
        upsample_channels=(16,),
        class_groups=(("car",),),
    )
    expected = ["conv_input", "conv1.0", "conv2.0", "conv3.0", "conv4.0", "conv4.1", "conv_out"]
    expected = [f"backbone_3d.{name}" for name in expected]
    expected += ["backbone_2d.blocks.0", "backbone_2d.deblocks.0"]
    expected += ["dense_head.shared_conv", "dense_head.heads_list.0"]
    assert list(blocks_of(network)) == expected
    assert blocks_of(network)["backbone_2d.blocks.0"] == ["backbone_2d.blocks.0.1"]


def test_every_layer_is_one_that_can_be_quantized() -> None:
    assert set(LAYERS) <= set(QUANTIZED)
