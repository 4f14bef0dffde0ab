import dataclasses
from collections import Counter

import numpy as np
import pytest

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.class_balance import class_balanced_rows, class_presence, num_draws
from cpq_train.data.index import NuScenesIndex


def test_counts_by_hand() -> None:
    """120 frames over classes: a tenth, 12, for each that occurs. 115: 11.5, cut off."""
    assert num_draws([50, 30, 20, 10, 4, 3, 2, 1, 0, 0]) == [12] * 8 + [0, 0]
    assert num_draws([60, 10, 10, 5, 5, 5, 5, 5, 5, 5]) == [11] * 10
    assert num_draws([0] * 10) == [0] * 10


def ancestors_counts(presence: np.ndarray) -> list[int]:
    """The published rule over lists of frames."""
    frames = {c: [i for i, shown in enumerate(presence) if shown[c]] for c in range(10)}
    total = sum(len(of_class) for of_class in frames.values())
    share = 1.0 / len(frames)
    return [int(len(of) * (share / (len(of) / total))) if of else 0 for of in frames.values()]


@pytest.mark.parametrize("seed", range(20))
def test_counts_equal_the_rule_over_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    presence = rng.random((rng.integers(50, 3000), 10)) < rng.random(10)
    assert num_draws(presence.sum(axis=0).tolist()) == ancestors_counts(presence)


def names_of(index: NuScenesIndex, row: int) -> set[str]:
    where = index.annotations(row)
    names = set()
    for a in range(where.start, where.stop):
        if index.annotation_num_lidar_pts[a] + index.annotation_num_radar_pts[a] > 0:
            class_id = int(index.annotation_classes[a])
            names.add(DETECTION_CLASSES[class_id] if class_id >= 0 else "ignore")
    return names


def test_real_tables(real_index: NuScenesIndex) -> None:
    rows = real_index.sample_rows("val")
    presence = class_presence(real_index, rows)
    for row, shown in zip(rows, presence, strict=True):
        names = names_of(real_index, int(row)) - {"ignore"}
        assert {DETECTION_CLASSES[c] for c in np.flatnonzero(shown)} == names
    drawn = class_balanced_rows(real_index, rows, seed=3)
    numbers = ancestors_counts(presence)
    assert len(drawn) == sum(numbers) > len(rows)
    start = 0
    for class_id, number in enumerate(numbers):  # class by class, from the frames that show it
        of_class = drawn[start : start + number]
        assert set(of_class.tolist()) <= set(rows[presence[:, class_id]].tolist())
        start += number
    assert max(Counter(drawn.tolist()).values()) > 1


def test_a_class_seen_by_radar_alone_counts(index: NuScenesIndex) -> None:
    rows = np.arange(len(index))
    everything = class_presence(index, rows)
    assert 0 < everything.sum() < everything.size
    for row in rows:
        assert everything[row].sum() == len(names_of(index, int(row)) - {"ignore"})


def test_the_seed_decides(real_index: NuScenesIndex) -> None:
    rows = real_index.sample_rows("val")
    first, again, other = (class_balanced_rows(real_index, rows, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) == len(other)
    assert (first != other).any()


def test_nothing_to_balance(index: NuScenesIndex) -> None:
    rows = np.arange(len(index))
    nothing = dataclasses.replace(index, annotation_classes=np.full(len(index.annotation_classes), -1))
    with pytest.raises(UserError, match="that 8 training samples show add up to 0: expected 10 or more"):
        class_balanced_rows(nothing, rows, 0)
