"""docs/real_nuscenes.md on real data, at full size, as far as the clouds reach: two samples."""

import json
from pathlib import Path

from real_mini import TOKENS, VERSION, two_samples

from cpq_train.verbs.cli import main


def test_real_samples_train_calibrate_score_and_compare_at_full_size(
    realdata_dir: Path, tmp_path: Path
) -> None:
    root = two_samples(realdata_dir, tmp_path / "root")
    data = ["--data.root", str(root), "--data.version", VERSION, "--data.train_split", "mini_val"]
    small = [*("--data.num_workers", "0", "--data.batch_size", "1", "--trainer.devices", "1")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    config, overlay = ["-c", "configs/centerpoint_voxel01.yaml"], ["-c", "configs/qat_int8.yaml"]

    def options(run: str) -> list[str]:
        return [*data, *small, *quiet, "--trainer.default_root_dir", str(tmp_path / run)]

    ptq = str(tmp_path / "ptq/ptq.ckpt")
    sampled = ["--data.num_calibration_samples", "1", "--data.force_calibration_on_val", "true"]
    plain = [
        "--data.gt_sampling",
        "null",
        "--data.class_balanced",
        "false",
        "--trainer.sync_batchnorm",
        "false",
    ]
    once = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "0",
    ]
    main(["fit", *config, *options("float"), *plain, *once])
    weights = str(tmp_path / "float/checkpoints/last.ckpt")
    main(
        [
            "calibrate",
            *config,
            *overlay,
            *options("ptq"),
            *sampled,
            "--model.weights",
            weights,
            "--output",
            ptq,
        ]
    )
    forced = ["--data.force_score_on_train", "true"]
    main(["validate", *config, *options("ptq"), *forced, "--model.weights", ptq])
    main(["compare", str(tmp_path / "ptq"), "--output", str(tmp_path / "report")])
    metrics = json.loads((tmp_path / "ptq/metrics.json").read_text())
    assert metrics["dataset"]["num_samples"] == len(TOKENS)
    assert metrics["coverage"]["Conv2d"] == [85, 85]
    results = json.loads((tmp_path / "ptq/results_nusc.json").read_text())["results"]
    assert set(results) == set(TOKENS)
