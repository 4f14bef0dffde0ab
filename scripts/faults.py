"""Ends one fit again and again at random moments, and compares its end with a run that was left alone.

    python scripts/faults.py --num_kills 20 --num_stops 20 --output /tmp/faults

One tiny model with learned ranges on simulated data, two loading processes, saved before every step. Each
start is the same command with `--ckpt_path last`. In turn it is killed with signal 9, a random time after its
first step of its own (every third time while a checkpoint is being written), and all its processes get
SIGTERM, as SLURM sends it, then or (every fourth time) a random time after its start. Prints one line per
start and ends with 1 if a bit differs, a stop ends with another code than 143, or a process stays behind.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from cpq_train.simulator import simulate

BASE = "configs/quickstart_float.yaml"
OVERLAY = "configs/quickstart_qat.yaml"
FIT = (sys.executable, "-m", "cpq_train", "fit")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=20)
    parser.add_argument("--num_stops", type=int, default=20)
    parser.add_argument("--num_epochs", type=int, default=24, help="of ten steps each")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = args.output / "data"
    args.output.mkdir(parents=True)
    simulate_data(root, args.seed)
    faults = f"{args.num_kills} kills, {args.num_stops} stops"
    say(f"{args.num_epochs} epochs of ten steps, {faults}, seed {args.seed}")
    weights = start(float_command(root, args.output / "float"), args.output / "float.log")
    weights.wait()
    whole = start(command(root, args.output, "whole", args.num_epochs), args.output / "whole.log")
    if whole.wait() != 0:
        say(f"the undisturbed run ended with code {whole.returncode}, see {args.output / 'whole.log'}")
        return 1
    rng = random.Random(args.seed)
    turns = [kill_once] * args.num_kills + [stop_once] * args.num_stops
    rng.shuffle(turns)
    for number, fault in enumerate(turns, 1):
        if not fault(args, root, number, rng):
            return 1
    return finish_and_compare(args, root)


def simulate_data(root: Path, seed: int) -> None:
    with redirect_stdout(sys.stderr):  # its progress is no part of the log
        simulate(
            root, num_scenes=7, num_val_scenes=2, num_samples_per_scene=2, version="v1.0-trainval", seed=seed
        )


def kill_once(args: argparse.Namespace, root: Path, number: int, rng: random.Random) -> bool:
    """Start the run and kill it; False where it ended before it could be killed."""
    log = args.output / f"killed{number:02d}.log"
    checkpoints = args.output / "killed" / "checkpoints"
    steps = steps_in(checkpoints)
    started_s = time.monotonic()
    process = start(command(root, args.output, "killed", args.num_epochs), log)
    wait_for_a_step(process, checkpoints)
    in_writing = number % 3 == 0
    if in_writing:
        while not list(checkpoints.glob("*.partial")) and process.poll() is None:
            time.sleep(0.0005)
    else:
        time.sleep(rng.uniform(0.0, 4.0))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        say(f"start {number} ended with code {process.returncode} before it was killed, see {log}")
        return False
    how = "while writing" if in_writing else "at random"
    took_s = time.monotonic() - started_s
    say(
        f"start {number:2d}: {came_from(log, steps)}; "
        f"killed {how} after {took_s:5.1f} s, left {told(steps_in(checkpoints))}"
    )
    return True


def stop_once(args: argparse.Namespace, root: Path, number: int, rng: random.Random) -> bool:
    """Start the run and send SIGTERM to all of its processes; False where it does not end as it should."""
    log = args.output / f"killed{number:02d}.log"
    checkpoints = args.output / "killed" / "checkpoints"
    steps = steps_in(checkpoints)
    process = start(command(root, args.output, "killed", args.num_epochs), log)
    started_s = time.monotonic()
    if number % 4:
        wait_for_a_step(process, checkpoints)
    time.sleep(rng.uniform(0.0, 4.0))
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    code = process.wait()
    time.sleep(0.1)
    orphans = [pid for pid in family if Path(f"/proc/{pid}").exists()]
    took_s = time.monotonic() - started_s
    say(
        f"start {number:2d}: {came_from(log, steps)}; SIGTERM to {len(family)} processes, "
        f"ended after {took_s:5.1f} s, left {told(steps_in(checkpoints))}"
    )
    if code != 128 + signal.SIGTERM or orphans:
        say(f"it ended with code {code}, left processes {orphans}, see {log}")
    return code == 128 + signal.SIGTERM and not orphans


def wait_for_a_step(process: subprocess.Popen[bytes], checkpoints: Path) -> None:
    earlier = stamp(checkpoints)
    while stamp(checkpoints) == earlier and process.poll() is None:
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """The processes that one has started, and theirs."""
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


def finish_and_compare(args: argparse.Namespace, root: Path) -> int:
    log = args.output / "last.log"
    steps = steps_in(args.output / "killed" / "checkpoints")
    process = start(command(root, args.output, "killed", args.num_epochs), log)
    code = process.wait()
    say(f"last start: {came_from(log, steps)}; ended with code {code}")
    is_equal, said = compare(args.output / "whole", args.output / "killed")
    say(said)
    return int(not is_equal or code != 0)


def compare(whole: Path, run: Path) -> tuple[bool, str]:
    """Whether a run ended as the undisturbed one, and a sentence."""
    one, two = (read(folder / "checkpoints/last.ckpt") for folder in (whole, run))
    tensors, others = one["state_dict"], two["state_dict"]
    differing = [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    steps = one["global_step"], two["global_step"]
    said = (
        f"step {steps[0]} and {steps[1]}: {len(differing)} of {len(tensors)} tensors differ from the "
        "undisturbed run"
    )
    return not differing and steps[0] == steps[1], said


def float_command(root: Path, run: Path) -> list[str]:
    return [*FIT, *common(root, run), "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]


def command(root: Path, output: Path, name: str, num_epochs: int) -> list[str]:
    """The one command that starts and restarts a run."""
    return [*FIT, *options(root, output, name, num_epochs), "--ckpt_path", "last"]


def options(root: Path, output: Path, name: str, num_epochs: int) -> list[str]:
    """Of a QAT fit with learned ranges, two loading processes a rank, saved before every step."""
    return [
        *common(root, output / name),
        *("-c", OVERLAY, "--model.weights", str(output / "float/checkpoints/last.ckpt")),
        *("--trainer.max_epochs", str(num_epochs), "--trainer.check_val_every_n_epoch", "4"),
        *("--model.ranges.amax", "learned", "--data.num_workers", "2"),
        *("--data.num_calibration_samples", "2", "--baselines.cache_dir", str(output / "baselines")),
        *("--resume.every_n_steps", "1"),
    ]


def common(root: Path, run: Path) -> list[str]:
    return [
        *(
            "-c",
            BASE,
            "--data.root",
            str(root),
            "--trainer.default_root_dir",
            str(run),
            "--data.num_sweeps",
            "2",
        ),
        *("--model.network.voxel_size", "[0.64, 0.64, 0.32]", "--data.batch_size", "1"),
        *("--trainer.enable_progress_bar", "false", "--trainer.check_val_every_n_epoch", "1"),
    ]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)


def stamp(checkpoints: Path) -> int:
    """When the newest resume point was written."""
    file = checkpoints / "resume.ckpt"
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def came_from(log: Path, steps: dict[str, int | None]) -> str:
    """What a start said of the checkpoint that it went on from, and that one's step."""
    said = [line for line in log.read_text(errors="replace").splitlines() if "--ckpt_path last:" in line]
    names = [name for name in steps if said and f"/{name}'" in said[-1]]
    if not said:
        return "ended before it looked for a checkpoint"
    return f"resumed at {told({name: steps[name] for name in names})}" if names else "started afresh"


def steps_in(checkpoints: Path) -> dict[str, int | None]:
    """Files of the folder and the step of each checkpoint; None for what is no checkpoint."""
    names = sorted(file.name for file in checkpoints.glob("*"))
    return {
        name: read(checkpoints / name)["global_step"] if name.endswith(".ckpt") else None for name in names
    }


def told(steps: dict[str, int | None]) -> str:
    return ", ".join(name if step is None else f"{name} (step {step})" for name, step in steps.items())


def read(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
