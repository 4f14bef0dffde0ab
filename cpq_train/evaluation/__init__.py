"""The nuScenes detection metric, the files of a run and the comparison of arms; import the modules you need."""
