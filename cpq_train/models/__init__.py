"""The float network in plain PyTorch: CenterPoint-Voxel, its targets, losses, decoding and rotated NMS."""

from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput
from cpq_train.models.centerpoint import CenterPoint
from cpq_train.models.code_weights import CODE_WEIGHTS
from cpq_train.models.config import BevGeometry, NetworkConfig
from cpq_train.models.decode import Detections, PostProcessing, decode
from cpq_train.models.losses import center_loss
from cpq_train.models.nms import rotated_iou_bev, rotated_nms
from cpq_train.models.targets import Targets, assign_targets

__all__ = [
    "BOX_BRANCHES",
    "CODE_WEIGHTS",
    "BevGeometry",
    "CenterPoint",
    "Detections",
    "HeadOutput",
    "NetworkConfig",
    "PostProcessing",
    "Targets",
    "assign_targets",
    "center_loss",
    "decode",
    "rotated_iou_bev",
    "rotated_nms",
]
