"""A ray-casting simulator of the nuScenes LiDAR that writes data sets in the nuScenes format."""

from cpq_train.simulator.simulate import simulate

__all__ = ["simulate"]
