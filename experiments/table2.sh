#!/usr/bin/env bash
# Table 2 of the SPO paper, in shape: TinyStories with full rankings of four, every method over its sweep.
#
#   bash experiments/table2.sh            # or SCALE=260K, SCALE=110M, JUDGE=gpt-4o-2024-08-06: see experiments/scale.sh
set -euo pipefail
source "$(dirname "$0")/scale.sh"
python experiments/frontier.py --methods=spo_rank,dpo_rank,sdpo_rank "${flags[@]}" --out_dir="out/table2-$run"
