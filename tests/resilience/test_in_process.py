"""Faults that need no process of their own."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_failure import Killed, Options, step_of
from torch import nn

from cpq_train.callbacks.evaluation import Evaluation
from cpq_train.common.checkpoint import write_checkpoint
from cpq_train.common.errors import UserError
from cpq_train.common.files import PARTIAL, remove_partial, write_whole
from cpq_train.data.position import EpochPosition
from cpq_train.data.samplers import TrainingSampler
from cpq_train.resilience.nonfinite import first_nonfinite_layer, nonfinite_loss
from cpq_train.resilience.resume import newest_checkpoint, next_run_number
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

DESCRIPTION = {
    **{"schema": 1, "arm": "float", "scheme": None, "batchnorm": "trained"},
    **{"layers": {}, "calibration": None, "parents": {}},
}


def checkpoint(step: int, ordinal: int, moment: str = "other", **run: float) -> dict:
    resume = {"run_started_s": 1.0, "ordinal": ordinal, "moment": moment, "random_states": [], **run}
    loops = {"optimizer_states": [], "loops": {}, "state_dict": {"network.x": torch.arange(1000.0)}}
    return {**loops, "global_step": step, "epoch": 0, "resume": resume, "quantization": DESCRIPTION}


def test_the_most_advanced_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(checkpoint(9, 5), tmp_path / "last.ckpt")
    write_checkpoint(checkpoint(9, 4, moment="before_validation"), tmp_path / "resume.ckpt")
    write_checkpoint(checkpoint(99, 50, run_started_s=0.5), tmp_path / "of-an-earlier-run.ckpt")
    write_checkpoint({"state_dict": {}}, tmp_path / "folded.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    assert newest_checkpoint(tmp_path, unscored_epoch=0) == tmp_path / "resume.ckpt"


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    """The run that began last counts, whose number is the next one, and not the one of the latest hour."""
    write_checkpoint(checkpoint(99, 50, run_started_s=86_401.0), tmp_path / "resume-previous.ckpt")
    assert next_run_number(tmp_path) == 1
    write_checkpoint(checkpoint(5, 3, run_started_s=1.0, run_number=1), tmp_path / "resume.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "resume.ckpt"
    assert next_run_number(tmp_path) == 2
    write_checkpoint(checkpoint(0, 1, run_started_s=0.5, run_number=2), tmp_path / "last.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"


WRONG = {
    "state_dict": None,
    "quantization": {**DESCRIPTION, "layers": {"conv": "float"}},
    "resume": {"ordinal": "last"},
    "global_step": 1.5,
    "epoch": True,
}


@pytest.mark.parametrize("entry", [*WRONG, "state_dict.x"])
def test_a_checkpoint_of_wrong_entries_is_passed_over(entry: str, tmp_path: Path) -> None:
    write_checkpoint(checkpoint(3, 1), tmp_path / "resume-previous.ckpt")
    wrong = {"state_dict": {"network.x": torch.tensor(torch.nan)}} if "." in entry else {entry: WRONG[entry]}
    write_checkpoint({**checkpoint(4, 2), **wrong}, tmp_path / "resume.ckpt")
    with pytest.warns(UserWarning, match=r"resume\.ckpt'"):
        assert newest_checkpoint(tmp_path) == tmp_path / "resume-previous.ckpt"


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path) -> None:
    write_checkpoint(checkpoint(3, 1), tmp_path / "resume-previous.ckpt")
    write_checkpoint(checkpoint(4, 2), tmp_path / "resume.ckpt")
    data = bytearray((tmp_path / "resume.ckpt").read_bytes())
    at = data.index(torch.arange(500.0, 502.0).numpy().tobytes())
    data[at] ^= 1
    damaged = {"torn": data[: len(data) // 2], "empty": b"", "flipped": bytes(data)}[damage]
    (tmp_path / "resume.ckpt").write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"resume\.ckpt' is corrupt"):
        assert newest_checkpoint(tmp_path) == tmp_path / "resume-previous.ckpt"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file'.*it needs 4 bytes, [\d,]+ bytes are free"):
        write_whole(tmp_path / "file", "new!")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"resume.ckpt.123{PARTIAL}").write_text("half")
    (tmp_path / "resume.ckpt").write_text("whole")
    remove_partial(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["resume.ckpt"]


def test_another_division_of_an_epoch_is_refused() -> None:
    position = EpochPosition(epoch=2, num_batches=3, samples_per_batch=4, num_samples=100, seed=0)
    position.check_order(samples_per_batch=4, num_samples=100, seed=0)
    with pytest.raises(UserError, match="samples_per_batch was 4 and is 8"):
        position.check_order(samples_per_batch=8, num_samples=100, seed=0)
    ended = EpochPosition(epoch=2, num_batches=25, samples_per_batch=4, num_samples=100, seed=0)
    ended.check_order(samples_per_batch=8, num_samples=100, seed=0)


def test_other_ranks_go_on_with_the_same_batches() -> None:
    """One rank with batches of four, and two of two after it, see every sample once, in the same groups."""
    dataset = list(range(24))

    def batches(num_ranks: int, batch_size: int, num_batches: int) -> list[set[tuple[int, int]]]:
        shares = []
        for rank in range(num_ranks):
            sampler = TrainingSampler(dataset, num_replicas=num_ranks, rank=rank, seed=7)  # type: ignore[arg-type]
            sampler.begin_at(3, num_batches * batch_size)
            shares.append(list(sampler))
        starts = range(0, len(shares[0]), batch_size)
        return [{key for share in shares for key in share[s : s + batch_size]} for s in starts]

    whole = batches(1, 4, 0)
    assert len(set.union(*whole)) == 24
    assert batches(2, 2, 0) == whole
    assert batches(2, 2, 2) == whole[2:]
    assert batches(1, 4, 2) == whole[2:]


def test_the_first_layer_that_is_not_finite() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_nonfinite_layer(network, lambda: network(x)) is None
    network[1].register_forward_hook(lambda module, inputs, output: output / 0 - output / 0)
    assert first_nonfinite_layer(network, lambda: network(x)) == "1"
    batch = {"voxel_features": x, "gt_boxes": x, "tokens": ["abc"]}
    nan = {"loss": torch.tensor(float("nan"))}
    network[2].weight.data.fill_(float("inf"))
    error = nonfinite_loss(network, lambda: network(x), nan, batch, "step 3")
    assert "the weights of 2.weight are already not finite" in str(error)


def test_a_nan_stops_the_run(
    fit_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error names samples and layer; the weights are those before the step; nothing leaks."""
    step = CenterPointDetector.training_step
    tokens: list[str] = []

    def poisoned(self: CenterPointDetector, batch: dict, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            tokens.extend(batch["tokens"])
            layer = self.network.get_submodule("backbone_2d.deblocks.0.0")
            layer.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        return step(self, batch, batch_idx)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    environment = dict(os.environ)
    monkeypatch.setattr(CenterPointDetector, "training_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        main(fit_options(tmp_path / "run"))
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert tokens[0] in said
    assert "first in the output of backbone_2d.deblocks.0.0" in said
    assert "step 2" in said
    assert step_of(tmp_path / "run") == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    new = {name for name, value in os.environ.items() if environment.get(name) != value}
    assert new <= {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}


@pytest.mark.parametrize("moment", ["while scoring the last validation", "while writing the scores"])
def test_a_signal_behind_the_last_step(
    moment: str, fit_options: Options, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It ends the fit, which leaves nothing half done, and the next start writes what is missing."""
    options = fit_options(tmp_path / "run", "--trainer.max_epochs", "1")
    method = "on_validation_epoch_end" if moment == "while scoring the last validation" else "on_fit_end"
    whole = getattr(Evaluation, method)

    def signalled(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        whole(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, method, signalled)
        with pytest.raises(SystemExit) as stop:
            main(options)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: " in capfd.readouterr().err
    assert not (tmp_path / "run/metrics.json").exists()
    main(options)
    assert (tmp_path / "run/metrics.json").exists()


def test_a_finished_run_ends_at_once(
    fit_options: Options,
    kill_in_step: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """Started again it trains nothing and leaves its files alone; a file named `last` changes nothing."""
    options = fit_options(tmp_path / "run", "--trainer.max_epochs", "1")
    main(options)
    before = {f.name: f.read_bytes() for f in (tmp_path / "run/checkpoints").iterdir()}
    metrics = (tmp_path / "run/metrics.json").read_text()
    kill_in_step(0)
    main(options)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run/checkpoints").iterdir()} == before
    assert (tmp_path / "run/metrics.json").read_text() == metrics
    with pytest.raises(Killed):
        main([*options, "--trainer.max_epochs", "2"])
