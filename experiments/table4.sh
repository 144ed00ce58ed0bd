#!/usr/bin/env bash
# Table 4 of the SPO paper, in shape: spo_basic with each regularizer, and with none.
#
#   bash experiments/table4.sh            # or SCALE=260K, SCALE=110M: see experiments/scale.sh
set -euo pipefail
source "$(dirname "$0")/scale.sh"
python experiments/frontier.py --methods=table4 --budgets=inf "${flags[@]}" \
    --out_dir="out/table4-$SCALE" --figure="out/table4-$SCALE/figure.png"
