#!/usr/bin/env bash
# Table 1 of the SPO paper, in shape: SFT, then every pairwise method over its sweep, judged each epoch: at equal KL, and the peak.
#
#   bash experiments/table1.sh                                      # SCALE=tiny: the demo's model, 2 CPU processes, minutes
#   SCALE=7B LLAMA=llama-2-7b JUDGE=gpt-4o-2024-08-06 PROCESSES=4 bash experiments/table1.sh       # AlpacaFarm, 4 GPUs, days
#
# Every run is a torchrun of spo_train.py with --resume=auto, and leaves `done` when it has ended: stopped at any point, the same
# command goes on where it was. The paper's 7B batch: 1 pair per GPU, 16 times, on 4 GPUs. It does not print its learning rates.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || { echo "$0: $1: takes no arguments; its settings are variables, see the script's head" >&2; exit 2; }
SCALE=${SCALE:-tiny} JUDGE=${JUDGE:-offline}
read -ra judge <<<"--judge=$JUDGE ${JUDGE_FLAGS:-}"
out=out/table1-$SCALE
mkdir -p "$out"
case "$SCALE" in
    tiny)
        processes=${PROCESSES:-2}
        [ -f data/demo/reference/ckpt.pt ] || python spo_train.py --max_iters=1 --eval_stories=0 --out_dir=out/demo
        sft_data=data/demo/stories.jsonl pairs=data/demo/pairs.jsonl init=data/demo/reference/ckpt.pt
        tokenizer=data/demo/tokenizer.model
        sft=(--max_iters=20 --batch_size=16 --learning_rate=1e-4)
        flags=(--max_iters=32 --eval_interval=8 --eval_stories=32 --batch_size=16 --kl_batch_size=16 --max_new_tokens=200)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;;
    7B)
        processes=${PROCESSES:-4}
        : "${LLAMA:?a folder of Llama-2-7B, as Meta or Hugging Face publishes it}"
        init=$LLAMA tokenizer=${TOKENIZER:-$LLAMA/tokenizer.model} sft_data=data/alpaca/sft.jsonl pairs=data/alpaca/pairs.jsonl
        [ -d data/alpaca ] || python alpaca_data.py download
        [ -f "$sft_data" ] || python alpaca_data.py sft --data=data/alpaca/sft.json --out="$sft_data"
        [ -f "$pairs" ] || python alpaca_data.py preferences --data=data/alpaca/alpaca_gpt4_preference.json --out="$pairs"
        big=(--dtype=bfloat16 --activation_checkpointing --micro_batch_size=1 --batch_size=64)
        sft=("${big[@]}" --learning_rate=2e-5)
        epoch=$(($(wc -l <"$pairs") / 64))
        flags=("${big[@]}" --max_iters=$((3 * epoch)) --eval_interval="$epoch" --eval_stories=268 --learning_rate=1e-6
               --max_new_tokens=512 --prompt=experiments/instructions.txt) ;;
    *) echo "SCALE=$SCALE: choose tiny or 7B" >&2; exit 2 ;;
esac

train() { # folder, flags: one run, unless it has ended already
    local folder=$1
    shift
    [ -f "$folder/done" ] && return
    mkdir -p "$folder"
    torchrun --standalone --nproc_per_node="$processes" --max-restarts=3 spo_train.py --out_dir="$folder" --resume=auto \
        --tokenizer="$tokenizer" "$@" >"$folder/output.txt" 2>"$folder/errors.txt" ||
        { tail -n 3 "$folder/errors.txt" >&2; exit 1; }
    touch "$folder/done"
}

train "$out/sft" --loss=sft --data="$sft_data" --init_from="$init" --eval_stories=0 "${sft[@]}"
while read -r loss settings; do
    read -ra set <<<"$settings"
    name=$(echo "$loss $settings" | tr -d ' ')
    run=("${flags[@]}")
    case "$loss" in spo*) ;; *) run=("${run[@]/--kl_batch_size=*/}") ;; esac # the others draw no samples
    train "$out/$name" --loss="$loss" --data="$pairs" --init_from="$out/sft/ckpt.pt" "${set[@]}" ${run[@]} "${judge[@]}"
    echo "$loss $settings"
done <<'SWEEPS'
spo --alpha=0.001 --beta=0.1
spo --alpha=0.01 --beta=0.1
spo --alpha=0.1 --beta=0.1
dpo --beta=0.001
dpo --beta=0.01
dpo --beta=0.1
ipo --tau=0.001
ipo --tau=0.01
ipo --tau=0.1
kto --beta=0.001
kto --beta=0.01
kto --beta=0.1
cpo --beta=0.001 --alpha=0.01
cpo --beta=0.01 --alpha=0.01
cpo --beta=0.1 --alpha=0.01
rdpo --beta=0.01 --alpha=0.01
rdpo --beta=0.1 --alpha=0.01
simpo --beta=2 --gamma=1
simpo --beta=2.5 --gamma=1.5
SWEEPS
python experiments/frontier.py --runs="$out/*" --out_dir="$out"
