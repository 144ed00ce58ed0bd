#!/usr/bin/env bash
# Table 4 of the SPO paper, in shape: spo_basic with each regularizer, and with none.
#
#   bash experiments/table4.sh            # or SCALE=260K, SCALE=110M, JUDGE=gpt-4o-2024-08-06: see experiments/scale.sh
set -euo pipefail
source "$(dirname "$0")/scale.sh"
python experiments/frontier.py --methods=table4 "${flags[@]}" --out_dir="out/table4-$run"
