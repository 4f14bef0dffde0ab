"""Our float checkpoint in OpenPCDet's file layout."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from cpq_train import __version__
from cpq_train.common.arm_names import FLOAT_ARMS
from cpq_train.common.checkpoint import network_state
from cpq_train.common.errors import UserError


def openpcdet_content(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What OpenPCDet's `save_checkpoint` would save of this network, without the state of its optimizer.

    Names and shapes of the network's tensors are OpenPCDet's already, with spconv 2.

    Args:
        checkpoint: Content of a float or float_tuned checkpoint of this project.
        path: For messages.

    Raises:
        UserError: It is quantized, or its BatchNorm is folded.
    """
    arm, batchnorm = (checkpoint["quantization"][key] for key in ("arm", "batchnorm"))
    if arm not in FLOAT_ARMS or batchnorm == "folded":
        raise UserError(
            f"checkpoint {str(path)!r} is {arm!r} with BatchNorm {batchnorm}; OpenPCDet's network takes "
            "float and float_tuned with BatchNorm trained or frozen"
        )
    step = int(checkpoint["global_step"])
    state = {name: tensor.contiguous() for name, tensor in network_state(checkpoint).items()}
    return {
        "epoch": int(checkpoint["epoch"]),
        "it": step,
        "model_state": OrderedDict(global_step=torch.tensor([step]), **state),
        "optimizer_state": None,
        "version": f"cpq_train+{__version__}",
    }
