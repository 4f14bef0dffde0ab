"""The quickstart model and its schedule, shrunk to a few seconds."""

from pathlib import Path

BASE = "configs/quickstart_float.yaml"
OVERLAY = "configs/quickstart_qat.yaml"


def tiny_options(root: Path, run: Path) -> list[str]:
    """Options for a run of the command line on the data of `root`, into the folder `run`."""
    return [
        *("--data.root", str(root), "--trainer.default_root_dir", str(run)),
        *("--model.network.voxel_size", "[0.64, 0.64, 0.32]", "--data.num_sweeps", "2"),
        *("--data.batch_size", "2", "--data.num_workers", "0", "--data.num_calibration_samples", "2"),
        *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--baselines.cache_dir", str(run.parent / "baselines")),
    ]
