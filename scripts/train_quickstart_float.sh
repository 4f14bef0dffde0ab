#!/usr/bin/env bash
# Reproduces checkpoints/quickstart_float.ckpt: simulates the training set, trains the laptop model from scratch (about an hour on 2 cores), and writes
# the checkpoint with its sidecar. Two ranks of batch 2, one thread each: sparse convolutions gain little from a second thread.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
run=runs/train_quickstart_float
data=data/quickstart_train
fit="fit -c configs/quickstart_float.yaml --data.root $data --data.batch_size 2 --trainer.devices 2 --trainer.strategy ddp --trainer.default_root_dir $run"
simulate="simulate --output $data --num_scenes 158 --num_val_scenes 8 --num_samples_per_scene 3 --version v1.0-trainval --seed 0"

.venv/bin/python -m cpq_train $simulate
OMP_NUM_THREADS=1 .venv/bin/python -m cpq_train $fit
.venv/bin/python scripts/release_checkpoint.py "$run" --output checkpoints/quickstart_float.ckpt \
  --command "python -m cpq_train $simulate && OMP_NUM_THREADS=1 python -m cpq_train $fit"
