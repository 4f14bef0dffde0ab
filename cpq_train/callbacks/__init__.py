"""What happens around a step: scoring, baselines, checkpoints, drift of ranges, time and memory by layer."""
