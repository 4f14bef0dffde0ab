"""Checkpoints of other projects: theirs as ours, ours as theirs, and ranges found elsewhere."""
