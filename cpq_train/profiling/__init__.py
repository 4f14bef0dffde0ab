"""What a network costs by layer: time, memory, storage; for any PyTorch modules, sparse ones included."""
