"""What a detector spends time in beside its modules, for a table of its parts."""

from __future__ import annotations

from cpq_train.profiling.instrument import Function

NETWORK_FUNCTIONS = (Function("cpq_train.sparse.convolution", "find_or_build", "rulebook"),)
"""In a pass of the network."""

DETECTION_FUNCTIONS = (
    *NETWORK_FUNCTIONS,
    Function("cpq_train.training.detector", "decode", "decode"),
    Function("cpq_train.models.decode", "suppress", "NMS"),
)
"""In a pass from voxels to boxes."""

QUANTIZER_FUNCTIONS = tuple(
    Function(f"cpq_train.quantization.{owner}", name, "quantizer")
    for owner, name in (
        ("quantizer:Quantizer", "forward"),
        ("quantizer:Quantizer", "coded"),
        ("quantizer:Quantizer", "codes"),
        ("layers.rounded_weights", "round_rows"),
        ("layers.activation", "rectified"),
        ("layers.residual", "added"),
    )
)
"""In quantized layers: rounding inputs and weights, with the ReLU or the sum that is one pass with it."""

STEP_FUNCTIONS = (
    *DETECTION_FUNCTIONS,
    Function("cpq_train.training.losses", "assign_targets", "targets"),
    Function("cpq_train.training.losses", "center_loss", "loss"),
)
"""In a training step."""
