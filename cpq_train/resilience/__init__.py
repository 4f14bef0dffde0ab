"""What lets a run outlive a cluster: resuming, preemption, atomic checkpoints, losses that are not finite."""
