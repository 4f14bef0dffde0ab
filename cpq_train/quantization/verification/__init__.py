"""A quantized network against the integer reference: layer by layer and end to end."""
