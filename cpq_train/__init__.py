"""Quantization-aware fine-tuning of CenterPoint-Voxel with PyTorch Lightning."""

__version__ = "0.1.0"
