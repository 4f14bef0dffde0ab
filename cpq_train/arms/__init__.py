"""The four arms, where network and quantization meet: structure, checkpoints, better starting points."""
