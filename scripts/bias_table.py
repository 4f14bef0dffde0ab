"""The table of biases in docs/quantization.md: schemes on the quickstart data with each kind of bias, paired.

    python scripts/bias_table.py --output runs/biases

A scheme is calibrated, scored and fine-tuned with biases of every kind, and each score is compared with that
of float biases over the same scenes. Runs that are there already are kept.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from jsonargparse import auto_cli
from scheme_table import BASE, FLOAT, cpq

from cpq_train.evaluation.bootstrap import interval
from cpq_train.report.runs import Run, load_runs

OVERLAYS = {
    **dict.fromkeys(("int8", "mixed", "nvidia_sparse"), "configs/quickstart_qat.yaml"),
    **dict.fromkeys(("w4a8", "w4a4"), "configs/quickstart_qat_4bit.yaml"),
}
KINDS = ("float", "accumulator", "fp16")


def main(
    output: Path = Path("runs/biases"),
    data: Path = Path("data/quickstart"),
    schemes: tuple[str, ...] = ("int8", "w4a8"),
    kinds: tuple[str, ...] = KINDS[:2],
    seeds: tuple[int, ...] = (0, 1),
) -> None:
    """Make the runs and the table.

    Args:
        output: Folder of the runs; the table is `table.md` in it.
        data: Data root, as scripts/quickstart.sh simulates it.
        schemes: Names of schemes, of `OVERLAYS`.
        kinds: Of biases; the first is what the others are compared with.
        seeds: Training seeds.
    """
    base = [*BASE, "--data.root", str(data)]
    lines = [
        "| scheme, run | bias | mAP | NDS | mAP against float biases | NDS |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for scheme in schemes:
        for kind in kinds:
            _make(scheme, kind, base, output, seeds)
        for name in ("ptq", *(f"qat_seed{seed}" for seed in seeds)):
            runs = load_runs([output / f"{scheme}_{kind}" / name for kind in kinds])
            lines += [
                _line(f"{scheme}, {name}", kind, run, runs[0]) for kind, run in zip(kinds, runs, strict=True)
            ]
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print((output / "table.md").read_text())


def _make(scheme: str, kind: str, base: list[str], output: Path, seeds: tuple[int, ...]) -> None:
    folder = output / f"{scheme}_{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(Path(f"configs/schemes/{scheme}.yaml").read_text())
    content["defaults"]["bias"] = kind
    (folder / "scheme.yaml").write_text(yaml.safe_dump(content))
    overlay = [*base, "-c", OVERLAYS[scheme], "--model.scheme", str(folder / "scheme.yaml")]
    ptq = folder / "ptq/ptq.ckpt"
    if not ptq.exists():
        cpq("calibrate", *overlay, "--model.weights", FLOAT, "--output", str(ptq))
    if not (ptq.parent / "metrics.json").exists():
        cpq("validate", *base, "--model.weights", str(ptq), "--trainer.default_root_dir", str(ptq.parent))
    for seed in seeds:
        run = folder / f"qat_seed{seed}"
        if not (run / "metrics.json").exists():
            options = ["--seed_everything", str(seed), "--data.seed", str(seed)]
            where = ["--model.weights", str(ptq), "--trainer.default_root_dir", str(run)]
            cpq("fit", *overlay, *options, *where)


def _line(name: str, kind: str, run: Run, baseline: Run) -> str:
    scores = [f"{run.score(metric):.4f}" for metric in ("mAP", "NDS")]
    differences = ["", ""] if run is baseline else [_difference(run, baseline, m) for m in ("mAP", "NDS")]
    return f"| {' | '.join([name, kind, *scores, *differences])} |"


def _difference(run: Run, baseline: Run, metric: str) -> str:
    ours, theirs = run.distribution(metric), baseline.distribution(metric)
    assert ours is not None
    assert theirs is not None
    low, high = interval(ours - theirs)
    return f"{run.score(metric) - baseline.score(metric):+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
