"""The float network in plain PyTorch: CenterPoint-Voxel, its targets, losses, decoding and rotated NMS."""

from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput
from cpq_train.models.centerpoint import CenterPoint
from cpq_train.models.config import BevGeometry, NetworkConfig

__all__ = ["BOX_BRANCHES", "BevGeometry", "CenterPoint", "HeadOutput", "NetworkConfig"]
