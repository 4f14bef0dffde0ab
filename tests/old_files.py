"""Files that earlier releases wrote, and what runs on them: runs of a small network with two class groups.

They were made on the data set of the fixture `simulated_root`, by the last commit before `data` was a key of
checkpoints. `latency.json` came with its format: it is of three of these checkpoints.
"""

from pathlib import Path
from typing import Any

SCHEMA_1 = Path(__file__).resolve().parent / "formats" / "schema_1"

CHECKPOINTS = {
    "float": SCHEMA_1 / "float/checkpoints/last.ckpt",
    "float_tuned": SCHEMA_1 / "float_tuned/checkpoints/folded.ckpt",
    "ptq": SCHEMA_1 / "ptq/ptq.ckpt",
    "qat": SCHEMA_1 / "qat/checkpoints/last.ckpt",
    "learned": SCHEMA_1 / "learned/checkpoints/last.ckpt",
}
"""Run -> its checkpoint; `learned` is of the arm qat too, its ranges were learned."""


def small_options(root: Path, run: Path, config: str = "float") -> list[str]:
    """Options for a run on the configuration that one of the old runs saved."""
    return [
        *("-c", str(SCHEMA_1 / config / "config.yaml")),
        *("--data.root", str(root), "--trainer.default_root_dir", str(run)),
        *("--baselines.cache_dir", str(run.parent / "baselines")),
    ]


def as_said_today(quantization: dict[str, Any]) -> dict[str, Any]:
    """The `quantization` entry of an old checkpoint with what it does not say, its wiring aside."""
    rows = {name: {**row, "bias": "float"} for name, row in quantization["layers"].items()}
    scheme = quantization["scheme"]
    if scheme is not None:
        defaults = {**scheme["defaults"], "bias": "float"}
        rules = [{key: value for key, value in rule.items() if key != "kinds"} for rule in scheme["rules"]]
        scheme = {
            **scheme,
            "rules": rules,
            "on_small_step": "error",
            "on_reuse": "error",
            "defaults": defaults,
        }
    return {**quantization, "schema": 2, "layers": rows, "scheme": scheme}
