"""What makes a calibrated network better without training it."""
