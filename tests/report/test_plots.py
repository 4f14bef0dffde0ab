"""Pictures from above: what stands where, told from the pixels."""

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cpq_train.common.detection_task import DetectionClass, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import GroundTruth, Predictions
from cpq_train.evaluation.metric import evaluate
from cpq_train.evaluation.predictions import LidarDetections
from cpq_train.report.bev import BevSample, bev_sample, busiest_sample, read_bev_sample, write_bev_sample
from cpq_train.report.plots import DETECTION_COLOUR, WON_COLOUR, BevPanel, draw_bev, draw_panel


def sample_with(boxes: list[list[float]], scores: list[float]) -> BevSample:
    none = np.zeros((0, 9))
    detections = np.array(boxes), np.array(scores), np.zeros(len(boxes), int)
    return BevSample("token", np.zeros((1, 3)), none, np.zeros(0, int), *detections)


def coloured(path: Path, colour: str) -> NDArray[np.int64]:
    """(N, 2) column and row of the pixels of a colour, above the legend."""
    pixels = matplotlib.image.imread(path)[:700, :, :3]
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.argwhere(np.abs(pixels - wanted).max(axis=2) < 0.02)[:, ::-1]


def test_boxes_stand_where_they_are_and_point_ahead(tmp_path: Path) -> None:
    """A car 30 m to the right that looks up: the heading line sticks out over its top edge only."""
    car = [30.0, 0.0, 0.0, 4.0, 2.0, 1.5, np.pi / 2, 0.0, 0.0]
    weak = [-30.0, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0]
    draw_bev(tmp_path / "bev.png", {"float": BevPanel(sample_with([car, weak], [0.9, 0.1]), 0.3)})
    found = coloured(tmp_path / "bev.png", DETECTION_COLOUR)
    assert len(found) > 50
    assert (found[:, 0] > 500).all()
    rows = found[:, 1]
    widest = np.bincount(rows).argsort()[-6:]  # front and rear edge
    assert widest.min() - rows.min() > 3 * (rows.max() - widest.max()) + 2


def test_panels_stand_side_by_side(tmp_path: Path) -> None:
    sample = sample_with([[0.0, 20.0, 0.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0]], [0.9])
    draw_bev(tmp_path / "bev.png", {"float": BevPanel(sample), "qat": BevPanel(sample)})
    columns = coloured(tmp_path / "bev.png", DETECTION_COLOUR)[:, 0]
    assert (columns < 800).sum() == pytest.approx((columns >= 800).sum(), rel=0.1)


def test_a_class_has_its_own_score() -> None:
    panel = BevPanel(sample_with([[0.0] * 9] * 3, [0.2, 0.4, 0.6]), np.array([0.5, 0.1]))
    assert panel.is_shown.tolist() == [False, False, True]
    panel.sample.labels[:] = [1, 0, 0]
    assert panel.is_shown.tolist() == [True, False, True]


def test_marks_stand_around_their_objects(tmp_path: Path) -> None:
    """A won object 30 m to the left: its ring lies there and nowhere else."""
    boxes = np.array([[-30.0, 0, 0, 4, 2, 1.5, 0, 0, 0], [30.0, 0, 0, 4, 2, 1.5, 0, 0, 0]])
    sample = replace(sample_with([[0.0] * 9], [0.1]), gt_boxes=boxes, gt_labels=np.zeros(2, int))
    panel = BevPanel(sample, 0.3, np.array([False, True]), np.array([True, False]))
    draw_bev(tmp_path / "bev.png", {"qat": panel})
    ring = coloured(tmp_path / "bev.png", WON_COLOUR)
    assert len(ring) > 50
    assert (ring[:, 0] < 300).all()


def test_the_picture_ends_behind_the_largest_class_range(tmp_path: Path) -> None:
    """A car 120 m to the right, in a picture to 52 m and in one to 152 m."""
    far = DetectionTask.of(
        {"tram": DetectionClass(("tram",), 150.0), "post": DetectionClass(("post",), 25.0)}
    )
    panel = BevPanel(sample_with([[120.0, 0.0, 0.0, 8.0, 8.0, 1.5, 0.0, 0.0, 0.0]], [0.9]), 0.3)
    draw_bev(tmp_path / "usual.png", {"float": panel})
    draw_bev(tmp_path / "far.png", {"float": panel}, far)
    assert len(coloured(tmp_path / "usual.png", DETECTION_COLOUR)) == 0
    columns = coloured(tmp_path / "far.png", DETECTION_COLOUR)[:, 0]
    assert 650 < columns.min() < columns.max() < 750


@pytest.mark.parametrize(
    ("extent_m", "radii"),
    [
        (52.0, [10, 20, 30, 40, 50]),
        (62.0, [10, 20, 30, 40, 50, 60]),
        (102.0, [20, 40, 60, 80, 100]),
        (1002.0, [200, 400, 600, 800, 1000]),
        (17.0, [5, 10, 15]),
        (2.1, [1, 2]),
    ],
)
def test_rings_are_few(extent_m: float, radii: list[float]) -> None:
    axes = Figure().subplots()
    draw_panel(axes, BevPanel(sample_with([], [])), extent_m)
    assert [patch.radius for patch in axes.patches] == radii
    assert [text.get_text() for text in axes.texts] == [f"{radius} m" for radius in radii]


def test_a_sample_keeps_points_that_are_far(tmp_path: Path) -> None:
    points = np.array([[50.0, -3.0, 0.1], [-203.7, 1.0, 2.0], [0.0, 480.3, -1.0]])
    write_bev_sample(tmp_path / "bev.npz", replace(sample_with([[0.0] * 9], [0.9]), points=points))
    errors = np.abs(read_bev_sample(tmp_path / "bev.npz").points - points).max(axis=1)
    assert (errors <= [0.02, 0.07, 0.13]).all()


@pytest.mark.parametrize("num_panels", [1, 2, 3, 4])
def test_the_legend_fits(num_panels: int, tmp_path: Path) -> None:
    """Its row below the panels is white at both ends, in the left and the right 1 % of the width."""
    none = np.zeros(1, bool)
    sample = replace(sample_with([[0.0] * 9], [0.9]), gt_boxes=np.ones((1, 9)), gt_labels=np.zeros(1, int))
    panels = {str(number): BevPanel(sample, 0.3, none, none) for number in range(num_panels)}
    draw_bev(tmp_path / "bev.png", panels)
    legend = matplotlib.image.imread(tmp_path / "bev.png")[-60:, :, :3]
    side = legend.shape[1] // 100
    assert (legend[:, :side] == 1).all()
    assert (legend[:, -side:] == 1).all()
    assert (legend < 0.5).any()


def test_files_of_the_first_release_lack_tokens(tmp_path: Path) -> None:
    write_bev_sample(tmp_path / "bev.npz", sample_with([[0.0] * 9], [0.9]))
    with np.load(tmp_path / "bev.npz") as stored:
        np.savez(tmp_path / "old.npz", **{name: stored[name] for name in stored.files if name != "gt_tokens"})
    assert len(read_bev_sample(tmp_path / "old.npz").gt_tokens) == 0


def test_round_trip(mini_index: NuScenesIndex, tmp_path: Path) -> None:
    row = int(mini_index.sample_rows("val")[0])
    points = np.random.default_rng(0).uniform(-50, 50, (150_000, 5)).astype(np.float32)
    detections = LidarDetections(np.ones((3, 9)), np.ones(3), np.arange(3))
    sample = bev_sample(mini_index, row, points, detections)
    assert len(sample.points) == 50_000
    write_bev_sample(tmp_path / "bev.npz", sample)
    read = read_bev_sample(tmp_path / "bev.npz")
    assert read.token == mini_index.sample_token(row)
    np.testing.assert_allclose(read.points, sample.points, atol=0.02)
    np.testing.assert_allclose(read.gt_boxes, sample.gt_boxes, rtol=1e-6)
    np.testing.assert_array_equal(read.labels, [0, 1, 2])
    np.testing.assert_array_equal(read.gt_tokens, sample.gt_tokens)
    assert len(read.gt_tokens) == len(read.gt_boxes) > 0
    (tmp_path / "bev.npz").write_text("other")
    with pytest.raises(UserError, match="not a readable"):
        read_bev_sample(tmp_path / "bev.npz")


def test_the_busiest_sample_does_not_depend_on_detections(mini_gt: GroundTruth) -> None:
    nothing = Predictions(mini_gt.boxes[np.zeros(0, int)], np.zeros(0))
    everything = Predictions(mini_gt.boxes, np.ones(len(mini_gt.boxes)))
    tokens = {busiest_sample(evaluate(mini_gt, found).matches) for found in (nothing, everything)}
    assert len(tokens) == 1
