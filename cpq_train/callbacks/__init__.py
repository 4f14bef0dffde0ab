"""Callbacks: scoring with the nuScenes metric, baselines of a tuned arm, drift of ranges."""
