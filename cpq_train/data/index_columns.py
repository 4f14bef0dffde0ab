"""Types, shapes and ranges of the columns of the index; `NuScenesIndex` says what they are.

S samples, F frames, C scenes, A annotations; K classes and T attributes of the task.
"""

from __future__ import annotations

from typing import Final

from cpq_train.common.arrays import Column
from cpq_train.data.column_files import Layout

LAYOUT: Final = Layout(
    columns={
        "scene_names": Column("S", ("C",)),
        "sample_tokens": Column("S", ("S",)),
        "sample_times_us": Column("i", ("S",), 8),
        "sample_scenes": Column("i", ("S",), 4),
        "sample_frames": Column("i", ("S",), 4),
        "sample_lidar_rotations": Column("f", ("S", 4), 8),
        "sample_lidar_translations": Column("f", ("S", 3), 8),
        "sample_ego_rotations": Column("f", ("S", 4), 8),
        "sample_ego_translations": Column("f", ("S", 3), 8),
        "sample_lidar_to_ego": Column("f", ("S", 4, 4), 8),
        "sample_ego_to_global": Column("f", ("S", 4, 4), 8),
        "frame_paths": Column("S", ("F",)),
        "frame_times_us": Column("i", ("F",), 8),
        "frame_previous": Column("i", ("F",), 4),
        "frame_ego_rotations": Column("f", ("F", 4), 8),
        "frame_ego_translations": Column("f", ("F", 3), 8),
        "frame_lidar_rotations": Column("f", ("F", 4), 8),
        "frame_lidar_translations": Column("f", ("F", 3), 8),
        "annotation_offsets": Column("i", ("S+1",), 8),
        "annotation_tokens": Column("S", ("A",)),
        "annotation_instances": Column("i", ("A",), 4),
        "annotation_classes": Column("i", ("A",), 1),
        "annotation_is_bike_rack": Column("b", ("A",), 1),
        "annotation_attributes": Column("i", ("A",), 1),
        "annotation_num_lidar_pts": Column("i", ("A",), 4),
        "annotation_num_radar_pts": Column("i", ("A",), 4),
        "annotation_boxes": Column("f", ("A", 9), 8),
        "annotation_translations": Column("f", ("A", 3), 8),
        "annotation_sizes_wlh": Column("f", ("A", 3), 8),
        "annotation_rotations": Column("f", ("A", 4), 8),
        "annotation_velocities": Column("f", ("A", 2), 8),
    },
    ranges={
        "sample_scenes": (0, "C"),
        "sample_frames": (0, "F"),
        "frame_previous": (-1, "F"),
        "annotation_classes": (-1, "K"),
        "annotation_attributes": (-1, "T"),
    },
    offsets={"annotation_offsets": "A"},
)
