"""Sparse convolutions on the CPU by kernels of our own, compiled by Numba and kept on disk."""
