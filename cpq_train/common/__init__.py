"""What every room may use: files, errors, the console, nuScenes terms, our checkpoint file."""
