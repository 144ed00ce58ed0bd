# Sourced by the table scripts: from SCALE and JUDGE to the data and the length of every run.
#
#   SCALE=demo    minutes on a laptop: the offline demo, its own model and its groups of four (the default)
#   SCALE=260K    CHECKPOINT=stories260K.bin TOKENIZER=tok512.model: 4,096 stories of the published model, an hour on 2 cores
#   SCALE=110M    CHECKPOINT=stories110M.pt TOKENIZER=tokenizer.model: the paper's sizes, days on one GPU
#
#   JUDGE=offline (the default), or a model such as JUDGE=gpt-4o-2024-08-06 with the key in OPENAI_API_KEY: it ranks the
#   groups and judges every evaluation. JUDGE_FLAGS are its other flags, for instance "--usd_per_million_in=2.5
#   --usd_per_million_out=10 --max_usd=200": at most so much for the ranking, and as much again for the runs together.
#
# Stopped at any point, the same command goes on where it was.
#
# The paper: 100,000 stories of the 110M model, groups of four, batches of 32 groups, 32 online samples every 8 steps,
# 5,000 steps of warm-up, a judgement of 1,000 stories every 1,000 steps. It does not print its learning rates.
[ $# = 0 ] || { echo "$0: $1: takes no arguments; its settings are variables, see experiments/scale.sh" >&2; exit 2; }
SCALE=${SCALE:-demo} JUDGE=${JUDGE:-offline}
case "$SCALE" in
    demo) flags=(--max_iters=60 --eval_interval=20); stories=4096 ;;
    260K) flags=(--max_iters=60 --eval_interval=20 --learning_rate=4e-5); stories=4096 ;;
    110M) flags=(--max_iters=20000 --eval_interval=1000 --eval_stories=500 --learning_rate=1e-6 --train_flags=--warmup_iters=5000)
          stories=100000 ;;
    *) echo "SCALE=$SCALE: choose demo, 260K or 110M" >&2; exit 2 ;;
esac
read -ra judge <<<"--judge=$JUDGE ${JUDGE_FLAGS:-}"
run=$SCALE
[ "$JUDGE" = offline ] || run=$SCALE-${JUDGE//\//_}
if [ "$run" != demo ]; then
    if [ "$SCALE" = demo ]; then
        CHECKPOINT=data/demo/reference/ckpt.pt TOKENIZER=data/demo/tokenizer.model
        [ -f "$CHECKPOINT" ] || python spo_train.py --max_iters=1 --eval_stories=0 --out_dir=out/demo
    fi
    : "${CHECKPOINT:?the model to align, a .pt or a llama2.c .bin}" "${TOKENIZER:?its sentencepiece model}"
    mkdir -p "data/$run"
    if [ ! -f "data/$run/stories.jsonl" ]; then
        python tinystories_data.py generate --checkpoint="$CHECKPOINT" --tokenizer="$TOKENIZER" \
            --num_stories="${STORIES:-$stories}" --out="data/$run/stories.jsonl"
    fi
    if [ ! -f "data/$run/ranked.jsonl" ]; then
        journal=()
        [ "$JUDGE" = offline ] || journal=(--journal="data/$run/journal.jsonl")
        python tinystories_data.py rank --stories="data/$run/stories.jsonl" --out="data/$run/ranked.jsonl" \
            --group_size=4 "${judge[@]}" "${journal[@]}"
    fi
    flags+=(--init_from="$CHECKPOINT" --tokenizer="$TOKENIZER" --data="data/$run/ranked.jsonl" "${judge[@]}")
fi
