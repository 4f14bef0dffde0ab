"""Bits of a mask of bytes: which gradients come back to a number."""

from __future__ import annotations

import numpy as np

POSITIVE = np.uint8(1)
"""Bit of a mask: a ReLU let the number through."""

INSIDE = np.uint8(2)
"""Bit of a mask: the number is not above amax."""
