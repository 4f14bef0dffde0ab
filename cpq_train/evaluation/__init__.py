"""The nuScenes detection metric, the files of a run, the comparison of arms: import the module you need."""
