"""Hostile and damaged files, and what every reader of the command line makes of them."""
