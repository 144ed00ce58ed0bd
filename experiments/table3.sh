#!/usr/bin/env bash
# Table 3 of the SPO paper, in shape: TinyStories best-of-n, the same groups with only the best named.
#
#   bash experiments/table3.sh            # or SCALE=260K, SCALE=110M, JUDGE=gpt-4o-2024-08-06: see experiments/scale.sh
set -euo pipefail
source "$(dirname "$0")/scale.sh"
python experiments/frontier.py --methods=spo_bon,sdpo_bon,best_sft "${flags[@]}" --out_dir="out/table3-$run"
