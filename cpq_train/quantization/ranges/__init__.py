"""Ranges of a network: found by calibration, watched in training, and what becomes of them there."""
