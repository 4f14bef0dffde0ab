"""Fixtures of the fault tests."""

from conftest_failure import fit_options, float_weights, kill_in_step  # noqa: F401 - pytest finds them here
