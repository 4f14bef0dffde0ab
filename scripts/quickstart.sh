#!/usr/bin/env bash
# From a float checkpoint to a QAT checkpoint, deployed and scored in onnxruntime, on simulated LiDAR, without a GPU: installs, simulates data, scores float,
# calibrates (PTQ), fine-tunes (QAT and the float_tuned control) at 8 bits and at 4-bit weights, exports, scores the engine, proves it, profiles, compares.
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

# Another seed than that of the data the float checkpoint was trained on.
cpq simulate --output "$data" --version v1.0-trainval --num_scenes 24 --num_val_scenes 10 --num_samples_per_scene 4 --seed 1

cpq validate "${base[@]}" --model.weights "$float" --trainer.default_root_dir "$runs/float"

# INT8, where nothing is lost on simulated data, and W4A8, where PTQ loses and QAT wins back. Each schedule has its control: the same training in float.
arms() {
  local name=$1 overlay=(-c "$2")
  cpq calibrate "${base[@]}" "${overlay[@]}" --model.weights "$float" --output "$runs/${name}ptq/ptq.ckpt"
  cpq validate "${base[@]}" --model.weights "$runs/${name}ptq/ptq.ckpt" --trainer.default_root_dir "$runs/${name}ptq"
  cpq fit "${base[@]}" "${overlay[@]}" --model.weights "$float" --model.arm float_tuned --trainer.default_root_dir "$runs/${name}float_tuned"
  cpq fit "${base[@]}" "${overlay[@]}" --model.weights "$runs/${name}ptq/ptq.ckpt" --trainer.default_root_dir "$runs/${name}qat"
}
arms "" configs/quickstart_qat.yaml
arms w4a8_ configs/quickstart_qat_4bit.yaml

# Deployed: one ONNX file, scored in onnxruntime on the same samples, and compared with its checkpoint code by code.
qat=$runs/qat/checkpoints/last.ckpt
engine=$runs/deployed/qat.onnx
cpq export "$qat" --output "$engine" --with_runtime
cpq validate "${base[@]}" --model.engine_file "$engine" --trainer.default_root_dir "$runs/deployed"
cpq verify "$qat" --engine "$engine" --root "$data" --num_samples 40

# The other files: 8-bit kernels in onnxruntime, and the two halves for NVIDIA's engines, both of the checkpoint with the biases that these have.
cpq export "$qat" --output "$runs/deployed/qat_fast.onnx" --target portable-fast
cpq export "$qat" --output "$runs/deployed/qat_sparse.onnx" --target libspconv --snap_biases
cpq export "$runs/deployed/qat_sparse.snapped.ckpt" --output "$runs/deployed/qat_dense.onnx" --target tensorrt

# What each costs by layer, and what a pass takes, measured in turn in one process.
cpq profile "${base[@]}" --trainer.accelerator cpu "$float" "$runs/ptq/ptq.ckpt" "$qat" --engine_file "$engine" --sample first --output "$runs"

cpq compare "$runs"/{float,float_tuned,ptq,qat,w4a8_float_tuned,w4a8_ptq,w4a8_qat,deployed} --latency "$runs/latency.json" --output "$runs"
echo
echo "Report: $runs/report.html"
