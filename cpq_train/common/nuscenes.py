"""The terms of the nuScenes detection task that every room shares: classes, categories, attributes, errors.

Sources: nuscenes-devkit 1.2.0 (`eval/detection/constants.py`, `eval/detection/utils.py`) and OpenPCDet's
class order.
"""

DETECTION_CLASSES: tuple[str, ...] = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
"""The ten classes in OpenPCDet's order; a class id is an index into this tuple, -1 means "ignore"."""

CLASS_GROUPS: tuple[tuple[str, ...], ...] = (
    ("car",),
    ("truck", "construction_vehicle"),
    ("bus", "trailer"),
    ("barrier",),
    ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)
"""Classes that share one head of CenterHead."""

CATEGORY_TO_CLASS: dict[str, str] = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
"""Fine nuScenes category to detection class; every other category is ignored."""

BIKE_RACK_CATEGORY = "static_object.bicycle_rack"
"""Bicycles and motorcycles inside such a box count neither as ground truth nor as detections."""

ATTRIBUTES: tuple[str, ...] = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)
"""An attribute id is an index into this tuple, -1 means "none"."""

TP_ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")
"""Translation (m), scale (1 - IoU), orientation (rad), velocity (m/s) and attribute (1 - accuracy) error."""

LIDAR_TOP = "LIDAR_TOP"
"""Name of nuScenes' LiDAR in table `sensor`."""
