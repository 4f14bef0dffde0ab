"""Roundings as single operators, which a GPU runs as one kernel each."""
