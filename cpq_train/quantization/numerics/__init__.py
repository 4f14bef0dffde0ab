"""The arithmetic of fake quantization: number formats, rounding, exact sums of codes."""
