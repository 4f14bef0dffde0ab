"""Deployment files: a network as a plan, a writer for each target, and the engines that run what it wrote."""
