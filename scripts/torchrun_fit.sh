#!/usr/bin/env bash
# Fits under torchrun, one process per GPU. If a process dies, torchrun starts all of them again, and they go on from the newest checkpoint of the run;
# so does the same command after an interruption. Arguments are those of `fit`.
#   one node:      bash scripts/torchrun_fit.sh -c configs/centerpoint_voxel01.yaml --data.root /data/sets/nuscenes
#   several nodes, on each of them:
#                  NUM_NODES=4 RENDEZVOUS=first-node:29400 bash scripts/torchrun_fit.sh -c ...
# Environment:
#   NUM_DEVICES    processes on this node; the number of its GPUs
#   NUM_NODES      1
#   RENDEZVOUS     host:port of the first node, where there are several; the port must be free on it
#   RUN_ID         cpq_train; names the run where several meet at one host and port
#   MAX_RESTARTS   3
#   PYTHON         python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
num_nodes=${NUM_NODES:-1}
num_devices=${NUM_DEVICES:-$("$python" -c "import torch; print(max(torch.cuda.device_count(), 1))")}

if [ "$num_nodes" -gt 1 ]; then
  : "${RENDEZVOUS:?NUM_NODES is $num_nodes: set RENDEZVOUS to host:port of the first node}"
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-cpq_train}")
else
  meeting=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# What follows "$@" holds against a configuration file in it.
exec "$python" -m torch.distributed.run "${meeting[@]}" --nnodes "$num_nodes" --nproc-per-node "$num_devices" --max-restarts "${MAX_RESTARTS:-3}" \
  -m cpq_train fit "$@" --ckpt_path last --trainer.devices "$num_devices" --trainer.num_nodes "$num_nodes"
