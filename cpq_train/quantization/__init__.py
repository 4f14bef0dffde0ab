"""Fake quantization of PyTorch networks, dense and sparse, in the arithmetic that is deployed."""
