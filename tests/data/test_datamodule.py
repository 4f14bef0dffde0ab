import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import Batch
from cpq_train.data.selection import stratified_choice
from cpq_train.data.sweeps import CloudError


def datamodule(root: Path, **arguments: Any) -> NuScenesDataModule:
    defaults: dict[str, Any] = {"version": "v1.0-mini", "num_workers": 0, "batch_size": 1, "num_sweeps": 3}
    return NuScenesDataModule(str(root), **(defaults | arguments))


def epoch_of(data: NuScenesDataModule, epoch: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.rank, loader.sampler.num_replicas = rank, world_size
    loader.sampler.num_samples = len(loader.dataset) // world_size
    loader.sampler.set_epoch(epoch)
    return list(loader)


def by_token(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {batch["tokens"][0]: batch["voxel_features"] for batch in batches}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_batches_do_not_depend_on_workers(pristine_root: Path) -> None:
    alone, shared = datamodule(pristine_root), datamodule(pristine_root, num_workers=2)
    for batch, other in zip(epoch_of(alone, 1), epoch_of(shared, 1), strict=True):
        assert batch["tokens"] == other["tokens"]
        assert torch.equal(batch["voxel_features"], other["voxel_features"])
        assert torch.equal(batch["gt_boxes"], other["gt_boxes"])


def test_workers_that_stay_learn_of_the_epoch(pristine_root: Path) -> None:
    loader = datamodule(pristine_root, num_workers=1).train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append(by_token(list(loader)))
    assert not same(epochs[0], epochs[1])
    assert same(epochs[2], by_token(epoch_of(datamodule(pristine_root), 2)))


def test_order_changes_with_epoch_and_seed(pristine_root: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = datamodule(pristine_root, seed=seed).train_dataloader().sampler
        sampler.set_epoch(epoch)
        return tuple(position for _, position in sampler)

    assert len({order(0, epoch) for epoch in range(6)}) > 2
    assert len({order(seed, 0) for seed in range(6)}) > 2
    assert order(3, 2) == order(3, 2)
    assert sorted(order(0, 0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_see_what_one_sees(pristine_root: Path, num_workers: int) -> None:
    """Each sample on one rank alone, drawn as on one rank, whatever the seeds of rank and worker."""
    whole = by_token(epoch_of(datamodule(pristine_root), 5))
    data = datamodule(pristine_root, num_workers=num_workers)
    halves = []
    for rank in range(2):
        seed_everything(17 + rank, workers=True)
        halves.append(by_token(epoch_of(data, 5, rank, 2)))
    assert [len(half) for half in halves] == [2, 2]
    assert not halves[0].keys() & halves[1].keys()
    assert same(halves[0] | halves[1], whole)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_sample_once(pristine_root: Path, world_size: int) -> None:
    data = datamodule(pristine_root)
    loaders = [data.evaluation_dataloader(rank, world_size) for rank in range(world_size)]
    rows = [[row for batch in loader for row in batch["sample_rows"].tolist()] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(r) for r in rows]
    num_busy = min(world_size, len(data.eval_rows))
    assert sorted(row for share in rows[:num_busy] for row in share) == data.eval_rows.tolist()
    # A rank that would have none takes part with one of the others', which counts once.
    assert rows[num_busy:] == [[row] for row in data.eval_rows[: world_size - num_busy]]
    assert rows[0] == data.eval_rows[::world_size].tolist()


def test_restriction_to_tokens(pristine_root: Path) -> None:
    tokens = [datamodule(pristine_root).index.sample_token(row) for row in (6, 5)]
    data = datamodule(pristine_root, sample_tokens=tokens)
    assert [batch["tokens"][0] for batch in data.val_dataloader()] == tokens
    assert [batch["tokens"][0] for batch in data.predict_dataloader()] == tokens
    assert len(data.train_dataloader()) == 4
    with pytest.raises(UserError, match="sample token 'x' is not one of the 4 samples in split 'val'"):
        _ = datamodule(pristine_root, sample_tokens=["x"]).eval_rows


def test_real_root_restricted_to_present_clouds(
    realdata_dir: Path, tmp_path: Path, real_tokens: list[str]
) -> None:
    real = {"num_sweeps": 1, "cache_dir": str(tmp_path), "batch_size": 2}
    data = datamodule(realdata_dir / "nuscenes_mini_val", sample_tokens=real_tokens, **real)
    (batch,) = list(data.val_dataloader())
    assert batch["tokens"] == real_tokens


def test_calibration_samples(pristine_root: Path) -> None:
    def tokens(number: int, seed: int) -> list[str]:
        data = datamodule(pristine_root, num_calibration_samples=number, seed=seed)
        return [batch["tokens"][0] for batch in data.calibration_dataloader()]

    assert [len(set(tokens(number, 0))) for number in (1, 2, 4)] == [1, 2, 4]
    assert tokens(2, 0) == tokens(2, 0)
    assert len({tuple(tokens(2, seed)) for seed in range(6)}) > 1
    data = datamodule(pristine_root, num_calibration_samples=4)
    train = {data.index.sample_token(row) for row in data.index.sample_rows("train")}
    assert set(tokens(4, 0)) == train
    plain = by_token(list(datamodule(pristine_root, val_split="train").evaluation_dataloader()))
    assert same(by_token(list(data.calibration_dataloader())), plain)


@pytest.mark.parametrize("number", [1, 3, 5, 9, 13])
def test_calibration_samples_are_spread_over_scenes(number: int) -> None:
    """Scenes of 2, 4 and 7 samples: equally many each, up to one, until one runs out."""
    rows = np.arange(100, 113)
    scenes = np.repeat([8, 3, 5], [2, 4, 7]).astype(np.int32)
    choices = {tuple(stratified_choice(rows, scenes, number, seed).tolist()) for seed in range(20)}
    assert (len(choices) == 1) == (number == 13)
    for choice in choices:
        assert sorted(set(choice)) == list(choice)
        counts = np.bincount(scenes[np.array(choice) - 100], minlength=9)[[8, 3, 5]]
        assert counts.sum() == number
        sizes = np.array([2, 4, 7])
        assert all(counts[i] == sizes[i] or counts[i] >= counts.max() - 1 for i in range(3))


def test_calibration_batches_are_dealt_whole(pristine_root: Path) -> None:
    """Three samples in batches of two, over one to three ranks: the third rank gets none."""
    data = datamodule(pristine_root, num_calibration_samples=3, batch_size=2)
    whole = [batch["tokens"] for batch in data.calibration_dataloader()]
    assert [len(tokens) for tokens in whole] == [2, 1]
    for world_size in (2, 3):
        shares = []
        for rank in range(world_size):
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
            shares.append([batch["tokens"] for batch in data.calibration_dataloader()])
        assert shares == [[whole[0]], [whole[1]], []][:world_size]


def test_calibration_on_validation_samples_is_refused(pristine_root: Path) -> None:
    arguments = {"num_calibration_samples": 3, "calibration_split": "val"}
    with pytest.raises(UserError, match=r"3 of the 3 samples belong to data.val_split 'val'"):
        datamodule(pristine_root, **arguments).calibration_dataloader()
    forced = datamodule(pristine_root, **arguments, force_calibration_on_val=True)
    assert len(forced.calibration_dataloader()) == 3
    info = forced.calibration_info()
    tokens = sorted(forced.index.sample_token(row) for row in forced.calibration_rows)
    assert info["split"] == "val"
    assert info["num_samples"] == 3
    assert info["tokens_sha256"] == hashlib.sha256("\n".join(tokens).encode()).hexdigest()


def test_calibration_where_the_validation_split_is_absent(pristine_root: Path) -> None:
    data = datamodule(pristine_root, num_calibration_samples=4, val_split="test")
    assert len(data.calibration_dataloader()) == 4


@pytest.mark.parametrize("number", [0, 5, -1])
def test_impossible_number_of_calibration_samples(pristine_root: Path, number: int) -> None:
    data = datamodule(pristine_root, num_calibration_samples=number)
    with pytest.raises(UserError, match=f"num_calibration_samples is {number}: expected 1 to 4"):
        data.calibration_dataloader()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_workers": -1}, {"num_sweeps": 0}])
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=f"{next(iter(arguments))} is {next(iter(arguments.values()))}: expected"
    ):
        datamodule(tmp_path, **arguments)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_message_of_a_bad_cloud_reaches_the_user(root: Path, num_workers: int) -> None:
    data = datamodule(root, num_workers=num_workers)
    row = int(data.eval_rows[1])
    path = data.index.frame_path(data.index.sample_frames[row])
    path.unlink()
    with pytest.raises(CloudError) as caught:
        list(data.val_dataloader())
    token = data.index.sample_token(row)
    assert str(caught.value) == f"cloud {path} of sample {token} cannot be read: No such file or directory"


def test_all_objects_without_points(root: Path) -> None:
    table = root / "v1.0-mini" / "sample_annotation.json"
    records = json.loads(table.read_text())
    table.write_text(json.dumps([record | {"num_lidar_pts": 0} for record in records]))
    data = datamodule(root)
    with pytest.raises(UserError, match="no sample with an object"):
        list(data.train_dataloader())
    assert next(iter(data.val_dataloader()))["gt_boxes"].shape == (1, 0, 10)


class Recorder(LightningModule):
    """Learns nothing, remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, str, float]] = []
        self.evaluated: list[str] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.trained.append((self.current_epoch, batch["tokens"][0], batch["voxel_features"].sum().item()))
        return self.weight * 0.0

    def validation_step(self, batch: Batch) -> None:
        self.evaluated += batch["tokens"]

    def predict_step(self, batch: Batch) -> list[str]:
        return batch["tokens"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **arguments,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_sees_what_an_uninterrupted_one_sees(
    pristine_root: Path, tmp_path: Path, num_workers: int
) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> Recorder:
        model = Recorder()
        run = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        data = datamodule(pristine_root, num_workers=num_workers)
        run.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(3)
    assert [epoch for epoch, _, _ in whole.trained] == np.repeat(range(3), 4).tolist()
    assert len({feature_sum for _, _, feature_sum in whole.trained}) == 12
    first = fit(1)
    resumed = fit(3, tmp_path / "1.ckpt")
    assert first.trained + resumed.trained == whole.trained
    assert len(resumed.evaluated) == 8


@pytest.mark.filterwarnings("ignore")
def test_predict_and_overfit_through_lightning(pristine_root: Path, tmp_path: Path) -> None:
    data = datamodule(pristine_root, test_split="val")
    predicted = trainer(tmp_path).predict(Recorder(), datamodule=data)
    assert predicted is not None
    assert [tokens[0] for tokens in predicted] == [data.index.sample_token(row) for row in data.eval_rows]
    model = Recorder()
    trainer(tmp_path, overfit_batches=2, max_epochs=1, enable_checkpointing=False).fit(model, datamodule=data)
    assert len(model.trained) == 2


@pytest.mark.filterwarnings("ignore")
def test_bad_cloud_ends_a_fit_with_its_own_message(root: Path, tmp_path: Path) -> None:
    data = datamodule(root, num_workers=1)
    path = data.index.frame_path(data.index.sample_frames[data.eval_rows[0]])
    path.write_bytes(b"123")
    with pytest.raises(
        UserError, match=rf"^cloud {re.escape(str(path))} of sample \w+ is truncated: 3 bytes"
    ):
        trainer(tmp_path).validate(Recorder(), datamodule=data)
