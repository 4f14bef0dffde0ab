"""The four arms, where network and quantization meet: their structure, their checkpoints, better starting points."""
