"""Sparse parts as files of NVIDIA's libspconv, which has an ONNX dialect of its own."""
