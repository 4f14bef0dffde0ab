"""Which layer gets how many bits: what each loses to quantization, and the best choice within a budget."""
