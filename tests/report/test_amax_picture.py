"""The heat map of ranges: what stands where, told from the pixels."""

from pathlib import Path

import matplotlib.image
import numpy as np
from numpy.typing import NDArray

from cpq_train.report.amax_history import AMAX_DRIFT_FILE, read_amax_history
from cpq_train.report.amax_picture import NARROWER_COLOUR, UNKNOWN_COLOUR, WIDER_COLOUR, draw_amax_drift

COLUMNS = "step,quantizer,amax,start_amax,live_amax,clipped_share,sqnr_db\n"


def drawn(folder: Path, rows: str) -> Path:
    (folder / AMAX_DRIFT_FILE).write_text(COLUMNS + rows)
    picture = folder / "amax_drift.png"
    draw_amax_drift(picture, read_amax_history(folder / AMAX_DRIFT_FILE))
    return picture


def cells(picture: Path, colour: str) -> NDArray[np.int64]:
    """(N, 2) column and row of the pixels of a colour, left of the scale; edges of letters left out."""
    pixels = matplotlib.image.imread(picture)[:, :1000, :3]
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    is_it = np.abs(pixels - wanted).max(axis=2) < 0.01
    return np.argwhere(is_it & (is_it.sum(axis=1, keepdims=True) > 50))[:, ::-1]


def test_wider_and_narrower_stand_at_their_quantizer_and_step(tmp_path: Path) -> None:
    """a doubles, b halves at the last step and was not measured at the first."""
    picture = drawn(tmp_path, "0,a,1,1,9,0,\n5,a,2,1,9,0,\n5,b,1,2,9,0,\n")
    wider, narrower, unknown = (
        cells(picture, colour) for colour in (WIDER_COLOUR, NARROWER_COLOUR, UNKNOWN_COLOUR)
    )
    assert min(map(len, (wider, narrower, unknown))) > 500
    assert wider[:, 1].max() < narrower[:, 1].min()
    assert np.median(wider[:, 0]) == np.median(narrower[:, 0])
    assert unknown[:, 0].max() < narrower[:, 0].min()
    assert abs(np.median(unknown[:, 1]) - np.median(narrower[:, 1])) <= 1


def test_what_did_not_move_has_no_colour(tmp_path: Path) -> None:
    picture = drawn(tmp_path, "0,a,1.5,1.5,9,0,\n5,a,1.5,1.5,9,0,\n")
    for colour in (WIDER_COLOUR, NARROWER_COLOUR, UNKNOWN_COLOUR):
        assert len(cells(picture, colour)) == 0


def test_quantizers_without_a_range_make_no_picture(tmp_path: Path) -> None:
    assert not drawn(tmp_path, "0,a,,,9,,\n").exists()
