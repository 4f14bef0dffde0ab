"""What a person calls on a network of their own; `cpq_train` itself offers it, see its `__init__`."""
