"""The nuScenes detection metric of a submission, its intervals, lost objects, and the files of a run."""
