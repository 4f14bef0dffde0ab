"""Turns the last checkpoint of a fit into one to ship: weights only, and a sidecar of where it came from."""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.files import sha256_of

KEPT = (
    *("state_dict", "hyper_parameters", "quantization", "data"),
    *("pytorch-lightning_version", "epoch", "global_step"),
)


def main() -> None:
    """Read the run, write the checkpoint and `<checkpoint>.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory of the fit")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--commit", default=_git("rev-parse", "HEAD"), help="the commit it ran at")
    args = parser.parse_args()
    content = read_checkpoint(args.run_dir / "checkpoints" / "last.ckpt")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: content[key] for key in KEPT}, args.output)
    sidecar = args.output.with_suffix(".json")
    content = _sidecar(args.run_dir, args.output, args.command, args.commit)
    sidecar.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.2f} MiB; {sidecar}")


def _sidecar(run_dir: Path, output: Path, command: str, commit: str) -> dict[str, Any]:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    metrics = json.loads((run_dir / "metrics.json").read_text())
    simulation = Path(config["data"]["root"]) / "simulation.json"
    return {
        "sha256": sha256_of(output),
        "command": command,
        "seed": config["seed_everything"],
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy")},
        "data": {**metrics["dataset"], "simulation": _read_simulation(simulation)},
        "metrics": metrics["metrics"],
        "AP": {name: row["AP"]["mean"] for name, row in metrics["per_class"].items()},
    }


def _read_simulation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return {**content, "scenes": len(content["scenes"])}


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
