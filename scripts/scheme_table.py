"""The table of schemes and arms in docs/results.md: makes every run on the quickstart data, and compares.

    python scripts/scheme_table.py --output runs/schemes

Runs that are there already are kept, so that an interrupted table goes on. `--schemes` and `--seeds` choose a
part of it. Every row is written with the command that made it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from cpq_train.report.compare import compare

FLOAT = "checkpoints/quickstart_float.ckpt"
BASE = ["-c", "configs/quickstart_float.yaml"]
SIMULATE = "--version v1.0-trainval --num_scenes 24 --num_val_scenes 10 --num_samples_per_scene 4 --seed 1"


@dataclass(frozen=True)
class Tuning:
    """A way to tune, by its name in the table.

    Attributes:
        name: Name of the run.
        arm: qat or float_tuned.
        options: Of `fit`.
    """

    name: str
    arm: str = "qat"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is run for one scheme.

    Attributes:
        scheme: Name of the file in configs/schemes.
        overlay: Configuration of the tuning.
        calibrations: Name of a PTQ run -> options of `calibrate` and `validate`.
        tunings: Each is run for every seed, from the first PTQ run or the float checkpoint.
    """

    scheme: str
    overlay: str
    calibrations: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"ptq": ()})
    tunings: tuple[Tuning, ...] = (Tuning("float_tuned", "float_tuned"), Tuning("qat"))


LEARNED = ("--model.ranges.amax", "learned", "--model.ranges.lr", "0.02")
DISTILLED = ("--model.distillation.teacher", FLOAT)
SINGLY = ("--data.batch_size", "1", "--model.calibration.num_batches", "16")
STRONG = {
    "ptq": (),
    "ptq_bias": (*SINGLY, "--model.calibration.bias_correction", "true"),
    "ptq_adaround": (*SINGLY, "--model.calibration.adaround_num_steps", "200"),
}
ALL_TUNINGS = (
    Tuning("float_tuned", "float_tuned"),
    Tuning("qat"),
    Tuning("qat_learned", options=LEARNED),
    Tuning("qat_distilled", options=DISTILLED),
    Tuning("qat_learned_distilled", options=(*LEARNED, *DISTILLED)),
)
EIGHT_BITS = (
    *("int8", "fp8", "nvidia_sparse"),
    *("conv2d_int8_dynamic", "conv2d_int8_static_max", "conv2d_w8a16"),
)
PLANS = {
    **{name: Plan(name, "configs/quickstart_qat.yaml") for name in EIGHT_BITS},
    **{
        name: Plan(name, "configs/quickstart_qat_4bit.yaml", STRONG, ALL_TUNINGS) for name in ("w4a8", "w4a4")
    },
}


def main(
    output: Path = Path("runs/schemes"),
    data: Path = Path("data/quickstart"),
    schemes: tuple[str, ...] = tuple(PLANS),
    seeds: tuple[int, ...] = (0, 1),
) -> None:
    """Make the runs and the table.

    Args:
        output: Folder of the runs; the table is `table.md` in it.
        data: Data root; simulated where it does not exist.
        schemes: Names of schemes.
        seeds: Training seeds of every tuned arm.
    """
    if not data.exists():
        cpq("simulate", "--output", str(data), *shlex.split(SIMULATE))
    base = [*BASE, "--data.root", str(data)]
    _validate(base, Path(FLOAT), output / "float")
    tables = [_rows(PLANS[name], base, output, seeds) for name in schemes]
    (output / "table.md").write_text("\n\n".join(tables) + "\n")
    print(f"Table: {output / 'table.md'}")


def _rows(plan: Plan, base: list[str], output: Path, seeds: tuple[int, ...]) -> str:
    """Make the runs of a scheme.

    Returns:
        Its table in Markdown.
    """
    folder = output / plan.scheme
    commands: dict[Path, str] = {output / "float": ""}
    overlay = [*base, "-c", plan.overlay, "--model.scheme", f"configs/schemes/{plan.scheme}.yaml"]
    for name, options in plan.calibrations.items():
        commands[folder / name] = _calibrate(overlay, base, folder / name, options)
    ptq = folder / next(iter(plan.calibrations)) / "ptq.ckpt"
    for tuning in plan.tunings:
        # The control of one schedule serves every scheme that is tuned with it.
        home = folder if tuning.arm == "qat" else output / Path(plan.overlay).stem
        for seed in seeds:
            run = home / f"{tuning.name}_seed{seed}"
            commands[run] = _fit(tuning, overlay, run, ptq if tuning.arm == "qat" else Path(FLOAT), seed)
    report = compare(list(commands), folder / "report")
    by_folder = {run["folder"]: run for run in report["runs"]}
    return _table(plan.scheme, [(by_folder[str(run)], command) for run, command in commands.items()])


def _calibrate(overlay: list[str], base: list[str], run: Path, options: Iterable[str]) -> str:
    checkpoint = run / "ptq.ckpt"
    arguments = [*overlay, "--model.weights", FLOAT, "--output", str(checkpoint), *options]
    if not checkpoint.exists():
        cpq("calibrate", *arguments)
    _validate(base, checkpoint, run)
    return _shown("calibrate", options)


def _validate(base: list[str], checkpoint: Path, run: Path) -> None:
    if not (run / "metrics.json").exists():
        weights = ["--model.weights", str(checkpoint), "--trainer.default_root_dir", str(run)]
        cpq("validate", *base, *weights)


def _fit(tuning: Tuning, overlay: list[str], run: Path, weights: Path, seed: int) -> str:
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    options = [*tuning.options, *seeds]
    if not (run / "metrics.json").exists():
        arm = ["--model.arm", tuning.arm, "--model.weights", str(weights)]
        cpq("fit", *overlay, *arm, *options, "--trainer.default_root_dir", str(run))
    return _shown("fit", [*(["--model.arm", tuning.arm] if tuning.arm != "qat" else []), *options])


def cpq(*arguments: str) -> None:
    """Run a command of cpq_train."""
    print(f"$ python -m cpq_train {shlex.join(arguments)}", flush=True)
    quiet = ("--trainer.enable_progress_bar", "false") if arguments[0] == "fit" else ()
    subprocess.run([sys.executable, "-m", "cpq_train", *arguments, *quiet], check=True)


def _shown(verb: str, options: Iterable[str]) -> str:
    return f"`{' '.join([verb, *options])}`"


def _table(title: str, rows: list[tuple[dict[str, Any], str]]) -> str:
    header = [
        "run",
        "mAP",
        "NDS",
        "mAP against float",
        "NDS against float",
        "PTQ loss in mAP won back",
        "command",
    ]
    lines = [_line(run, command) for run, command in rows]
    cells = [header, ["---", *["--:"] * 5, "---"], *lines]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(line)} |" for line in cells)])


def _line(run: dict[str, Any], command: str) -> list[str]:
    gaps = [_interval(gap["value"], gap["interval"], "+.4f") for gap in run["gap_to_float"].values()]
    scores = [_interval(run["metrics"][name], run["confidence"][name], ".4f") for name in ("mAP", "NDS")]
    share = run["ptq_loss_won_back"]["mAP"]["value"]
    won_back = "null" if share is None and run["arm"] == "qat" else "" if share is None else f"{share:.0%}"
    return [Path(run["folder"]).name, *scores, *gaps, won_back, command]


def _interval(value: float | None, interval: list[float] | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
