"""Whole networks as files of standard ONNX operators: the exact one, and the one of fused kernels."""
