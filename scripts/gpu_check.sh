#!/usr/bin/env bash
# Proves on a GPU what was designed without one: tests, codes, steps, memory, waits, a CUDA graph, a fit and its profile, in eight minutes by design and,
# once installed, without a network. Prints tables, writes docs/gpu.json and docs/gpu.md. Arguments go to scripts/gpu_check.py (--help lists them).
# Where the environment has what this project needs (a cluster's), its python runs; elsewhere scripts/install.sh makes one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

python=${PYTHON:-python}
needed='"torch", "spconv", "lightning", "numba", "nuscenes", "pytorch_quantization", "pytest"'
if ! "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ($needed))))" 2> /dev/null; then
  bash scripts/install.sh
  python=.venv/bin/python
fi
exec "$python" scripts/gpu_check.py "$@"
