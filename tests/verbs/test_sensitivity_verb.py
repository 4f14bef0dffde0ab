"""The verb `sensitivity` as a user runs it."""

import json
from pathlib import Path

import pytest
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.verbs.cli import main

NUM_BLOCKS = 23


def _options(verb: str, arms: dict[str, Path], root: Path, run: Path, *more: str) -> list[str]:
    weights = ("--model.weights", str(arms["float"] / "checkpoints/last.ckpt"))
    return [verb, "-c", BASE, "-c", OVERLAY, *tiny_options(root, run), *weights, *more]


def _sensitivity(arms: dict[str, Path], root: Path, output: Path, *more: str) -> list[str]:
    own = ("--output", str(output), "--bits", "[3]", "--num_samples", "1", *more)
    return _options("sensitivity", arms, root, output.parent / "run", *own)


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_measures_once_and_assigns_within_a_budget(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sensitivity"
    main(_sensitivity(arms, simulated_root, output))
    assert "caution: losses on few samples (--num_samples 1) rank units badly" in capsys.readouterr().out
    log = (output / "measurements.jsonl").read_text().splitlines()
    assert len(log) == 2 + 2 * NUM_BLOCKS
    report = json.loads((output / "sensitivity.json").read_text())
    (unquantized,) = (r for r in report["measurements"] if r["mode"] == "none")
    assert unquantized["loss"] < 1e-6
    (smallest,) = (network["mib"] for network in report["networks"])
    budget = 2 * smallest

    main(_sensitivity(arms, simulated_root, output, "--budget_mib", str(budget)))
    assert (output / "measurements.jsonl").read_text().splitlines()[:-1] == log
    report = json.loads((output / "sensitivity.json").read_text())
    assert smallest < report["mixed"]["mib"] <= budget
    assert set(report["assignment"].values()) == {"float", "W3"}
    assert "assigned" in capsys.readouterr().out
    assert (output / "sensitivity.png").stat().st_size > 10_000

    scheme = ("--model.scheme", str(output / "scheme.yaml"), "--output", str(tmp_path / "ptq.ckpt"))
    main(_options("calibrate", arms, simulated_root, tmp_path / "run", *scheme))


def test_detections_of_a_single_unit_are_scored_where_asked(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = tmp_path / "scheme.yaml"
    scheme.write_text(
        "rules: [{layers: '*', weight: off, input: off}, "
        "{layers: '*shared_conv*', weight: {mode: static}, input: {mode: static}}]\n"
    )
    more = ("--metric", "nds", "--model.scheme", str(scheme))
    main(_sensitivity(arms, simulated_root, tmp_path / "out", *more))
    report = json.loads((tmp_path / "out/sensitivity.json").read_text())
    assert list(report["units"]) == ["dense_head.shared_conv"]
    assert len((tmp_path / "out/measurements.jsonl").read_text().splitlines()) == 2
    by_mode = {r["mode"]: r for r in report["measurements"]}
    for same, as_mode in (("all", "alone"), ("none", "left_out")):
        assert by_mode[same] | {"mode": "", "unit": ""} == by_mode[as_mode] | {"mode": "", "unit": ""}
    assert {"mAP", "NDS"} <= by_mode["all"].keys()
    assert "NDS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--num_samples", "3"],
            "--num_samples is 3: expected 1 to data.num_calibration_samples, which is 2",
        ),
        (
            ["--bits", "[4, 3]", "--input_bits", "[8]"],
            "--input_bits is [8]: expected one for each of --bits [4, 3]",
        ),
        (["--bits", "[4, 4]"], "--bits is [4, 4]: expected one choice or more, and none twice"),
        (["--bits", "[8, 1]"], "bits: got 1, accepted: whole numbers from 2 to 16"),
        (["--budget_mib", "1", "--budget_bit_macs", "0.1"], "are both given: expected one of them"),
        (["--budget_mib", "0.01"], "budget 0.01 MiB of weights cannot be met; the smallest possible is 0."),
        (["--model.weights", "null"], "sensitivity needs model.weights"),
    ],
)
def test_bad_settings(
    options: list[str],
    message: str,
    arms: dict[str, Path],
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert message in _fails([*_sensitivity(arms, simulated_root, output), *options], capsys)
    assert not (output / "measurements.jsonl").exists()
