"""Verbs that write, on a disk that takes no more: a line with what is free, and nothing half-written."""

import logging
from pathlib import Path

import pytest
from command_line import fails
from limits import files_of_at_most
from tiny_model import BASE, OVERLAY, tiny_options

SCHEME = ["--model.scheme", "configs/schemes/int8.yaml"]


def _commands(root: Path, arms: dict[str, Path], out: Path) -> dict[str, list[str]]:
    """Verb -> a command that writes below `out`."""
    float_, qat = (str(arms[arm] / "checkpoints/last.ckpt") for arm in ("float", "qat"))
    network = ["-c", BASE, *tiny_options(root, out / "run")]
    tuned = ["-c", BASE, "-c", OVERLAY, *tiny_options(root, out / "run"), *SCHEME]
    cloud = str(next((root / "samples/LIDAR_TOP").iterdir()))
    return {
        "fit": ["fit", *network],
        "validate": ["validate", *network, "--model.weights", float_],
        "test": ["test", *network, "--model.weights", float_],
        "predict": ["predict", *network, "--model.weights", float_, "--clouds", cloud],
        "calibrate": ["calibrate", *tuned, "--model.weights", float_, "--output", f"{out}/ptq.ckpt"],
        "sensitivity": [
            *("sensitivity", *tuned, "--model.weights", float_, "--output", f"{out}/sensitivity"),
            *("--num_samples", "1", "--bits", "[8]"),
        ],
        "profile": ["profile", *network, "--output", f"{out}/profile", "--num_passes", "1"],
        "profile several": ["profile", *network, qat, "--output", f"{out}/profile", "--num_passes", "1"],
        "verify": ["verify", qat, "--root", str(root), "--output", f"{out}/verify.json"],
        "export": ["export", qat, "--output", f"{out}/x.onnx"],
        "convert": ["convert", "--input", float_, "--target", "openpcdet", "--output", f"{out}/x.pth"],
        "compare": ["compare", *(str(arms[arm]) for arm in ("float", "ptq", "qat")), "--output", f"{out}/r"],
    }


VERBS = (
    *("fit", "validate", "test", "predict", "calibrate", "sensitivity", "profile", "profile several"),
    *("verify", "export", "convert", "compare"),
)


@pytest.mark.parametrize("num_bytes", [10, 3000])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk(
    verb: str,
    num_bytes: int,
    simulated_root: Path,
    arms: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers write to the streams of other tests
    (tmp_path / "baselines").mkdir()
    with files_of_at_most(num_bytes):
        error = fails(_commands(simulated_root, arms, tmp_path)[verb], capsys)
    assert "bytes are free (File too large)" in error
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in left if file.suffix == ".partial" or file.stat().st_size in (0, num_bytes)]
