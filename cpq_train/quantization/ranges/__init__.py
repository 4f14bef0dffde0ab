"""Ranges of tensors: how they are found, what becomes of them in training, how far they move."""
