"""The LightningModule and what trains it: optimizer, strategy, scoring in the loop."""
