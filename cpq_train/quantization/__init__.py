"""Fake quantization of PyTorch networks with dense and sparse convolutions, in the arithmetic that is deployed."""
