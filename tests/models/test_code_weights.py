import pytest

from cpq_train.common.errors import UserError
from cpq_train.models.code_weights import CODE_WEIGHTS, resolve_code_weights
from cpq_train.training.detector import CenterPointDetector


def test_ancestors_in_their_own_order() -> None:
    """Their lists as published, moved to the order centre, z, size, cosine, sine, velocity."""
    published = [1.0] * 6 + [0.2, 0.2] + [1.0] * 2  # OpenPCDet and tianweiy write the same list ...
    assert resolve_code_weights("openpcdet") == tuple(published) == CODE_WEIGHTS
    order = [0, 1, 2, 3, 4, 5, 8, 9, 6, 7]  # ... of which tianweiy's velocity comes before the rotation
    assert resolve_code_weights("tianweiy") == tuple(published[i] for i in order)
    assert resolve_code_weights("mmdet3d") == (1.0,) * 8 + (0.2, 0.2)


def test_a_detector_keeps_ten_numbers() -> None:
    for value in ("tianweiy", [1, 1, 1, 1, 1, 1, 1, 1, 0.2, 0.2]):
        detector = CenterPointDetector(code_weights=value)
        assert detector.hparams["code_weights"] == [1.0] * 8 + [0.2, 0.2]
        assert detector.code_weights == (1.0,) * 8 + (0.2, 0.2)
    assert CenterPointDetector().hparams["code_weights"] == list(CODE_WEIGHTS)


@pytest.mark.parametrize("value", ["waymo", [1.0] * 9, [1.0] * 9 + [-0.1], [float("nan")] * 10])
def test_wrong_weights(value: object) -> None:
    with pytest.raises(UserError, match=r"code_weights is .*openpcdet, tianweiy, mmdet3d"):
        CenterPointDetector(code_weights=value)  # type: ignore[arg-type]
