#!/usr/bin/env bash
# Reproduces checkpoints/quickstart_float.ckpt: simulates the training set, trains the laptop model from scratch (about an hour on 2 cores), and writes
# the checkpoint with its sidecar. Two ranks of batch 2, one thread each: sparse convolutions gain little from a second thread.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
run=runs/train_quickstart_float
data=data/quickstart_train
simulate="simulate --output $data --num_scenes 158 --num_val_scenes 8 --num_samples_per_scene 3 --version v1.0-trainval --seed 0"
fit="fit -c configs/quickstart_float.yaml --data.root $data --data.batch_size 2 --trainer.devices 2 --trainer.strategy ddp"
# 18 epochs from scratch with OpenPCDet's code weights, then 7 from there with the configuration's.
first="$fit --model.code_weights openpcdet --trainer.default_root_dir ${run}_1"
second="$fit --model.weights ${run}_1/checkpoints/last.ckpt --model.optimizer.lr 0.002 --model.optimizer.warmup_share 0.2 --trainer.max_epochs 7 --trainer.check_val_every_n_epoch 7 --trainer.default_root_dir ${run}_2"

export OMP_NUM_THREADS=1
for command in "$simulate" "$first" "$second"; do
  .venv/bin/python -m cpq_train $command
done
.venv/bin/python scripts/release_checkpoint.py "${run}_2" --output checkpoints/quickstart_float.ckpt \
  --command "export OMP_NUM_THREADS=1; python -m cpq_train $simulate; python -m cpq_train $first; python -m cpq_train $second"
