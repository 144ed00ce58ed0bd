#!/usr/bin/env bash
# Everything that a GPU has to show, in one call of at most five minutes.
#
#   bash experiments/gpu.sh                    # one NVIDIA GPU, 80 GB or more; nothing is downloaded
#   bash experiments/gpu.sh --only=W4          # one part
#   OUT=/tmp/gpu bash experiments/gpu.sh       # results.jsonl, table.md, output.log; default: out/gpu
cd "$(dirname "$0")/.." && exec python3 experiments/gpu.py --out="${OUT:-out/gpu}" "$@"
