#!/bin/sh
# Kills a fit 20 times and stops it 20 times at random moments, and proves that it ends bit-equal to an undisturbed one. The log is kept in docs/faults.log.
#   scripts/faults.sh [--num_kills N] [--num_stops N] [--num_epochs N] [--seed N]
set -eu
cd "$(dirname "$0")/.."
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
log=$output/faults.log
status=0
PYTHONPATH=$PWD ${PYTHON:-python} scripts/faults.py --output "$output/runs" "$@" > "$log" || status=$?
cat "$log"
[ "$status" -eq 0 ] && cp "$log" docs/faults.log
exit "$status"
