#!/usr/bin/env bash
# From a float checkpoint to a QAT checkpoint with its nuScenes score, on simulated LiDAR, without a GPU:
# installs, simulates data, scores float, calibrates (PTQ), fine-tunes (QAT and the float_tuned control), profiles, proves the result in integers, compares.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

# One thread beside the loading worker: this small model gains little from a second one, and on a busy machine threads wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

cpq() { echo; echo "\$ python -m cpq_train $*"; .venv/bin/python -m cpq_train "$@"; }
data=data/quickstart
runs=runs/quickstart
float=checkpoints/quickstart_float.ckpt
base=(-c configs/quickstart_float.yaml --data.root "$data")
qat=(-c configs/quickstart_qat.yaml)

# Another seed than that of the data the float checkpoint was trained on.
cpq simulate --output "$data" --version v1.0-trainval --num_scenes 24 --num_val_scenes 10 --num_samples_per_scene 4 --seed 1

cpq validate  "${base[@]}" --model.weights "$float" --trainer.default_root_dir "$runs/float"
cpq calibrate "${base[@]}" "${qat[@]}" --model.weights "$float" --output "$runs/ptq/ptq.ckpt"
cpq validate  "${base[@]}" --model.weights "$runs/ptq/ptq.ckpt" --trainer.default_root_dir "$runs/ptq"
cpq fit       "${base[@]}" "${qat[@]}" --model.weights "$float" --model.arm float_tuned --trainer.default_root_dir "$runs/float_tuned"
cpq fit       "${base[@]}" "${qat[@]}" --model.weights "$runs/ptq/ptq.ckpt" --trainer.default_root_dir "$runs/qat"

# What each costs: time, memory and storage by layer.
for arm in float ptq qat; do
  checkpoint=$(case $arm in float) echo "$float" ;; ptq) echo "$runs/ptq/ptq.ckpt" ;; qat) echo "$runs/qat/checkpoints/last.ckpt" ;; esac)
  cpq profile "${base[@]}" --model.weights "$checkpoint" --sample first --output "$runs/$arm"
done

cpq verify "$runs/qat/checkpoints/last.ckpt" --root "$data"

cpq compare "$runs/float" "$runs/float_tuned" "$runs/ptq" "$runs/qat" --output "$runs"
echo
echo "Report: $runs/report.html"
