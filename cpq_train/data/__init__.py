"""nuScenes as batches of voxels: index, sweeps, boxes, augmentation, voxelization, data module."""
